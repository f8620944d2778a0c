// Forward for a few tokens over a packed weight: each line of codes is read once, decoded in registers and
// multiplied by every token; nothing decoded is stored.
#include "common/by_dtype.h"
#include "common/packed_lines.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "linear/linear.h"

namespace tw {
namespace {

constexpr double kSerialWeights = 3e4;  // below, a second thread costs more than it does

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// How lines meet tokens. Inputs one by one as floats:
template <class C, Codes KIND, bool IN_PAIRS = sizeof(C) == 2 && KIND == Codes::table>
struct LineProduct {
  using X = float;  // what tokens are kept as
  const Table table;

  explicit LineProduct(const float* t) : table(t) {}

  template <int TOKENS>
  [[gnu::always_inline]] void add(vf (&part)[TOKENS], vi words, const X* x, int64_t ld) const {
    each_input<KIND>([&](auto at) {
      constexpr int K = decltype(at)::value;
      const vf value = line_value<KIND, K>(table, words);
#pragma GCC unroll 16
      for (int t = 0; t < TOKENS; ++t) part[t] = fma(value, set1(x[t * ld + K]), part[t]);
    });
  }
};

// or in pairs, where there is a dot product of them; 8-bit codes would first have to be converted
template <class C, Codes KIND>
struct LineProduct<C, KIND, true> {
  using X = C;
  const PairTable<C> table;

  explicit LineProduct(const float* t) : table(t) {}

  template <int TOKENS>
  [[gnu::always_inline]] void add(vf (&part)[TOKENS], vi words, const X* x, int64_t ld) const {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      const auto pair = table.at(shift_right(words, 4 * p));
#pragma GCC unroll 16
      for (int t = 0; t < TOKENS; ++t)
        part[t] = Unit<X>::mac(part[t], Unit<X>::broadcast(x + t * ld + 2 * p), pair);
    }
  }
};

// The tokens as the kernel reads them: rows of `ld`, zeros past I and past the last token.
template <class X>
struct FewTokens {
  const X* x;
  int64_t ld;
  const float* group_sums;  // (tokens, groups) sums of x, for offsets
  const float* hidden;      // (tokens, R), scaled
};

// y of BLOCKS row blocks from `block` on.
template <class T, class C, Codes KIND, int TOKENS, int BLOCKS>
void row_blocks(const LinearCall& call, const FewTokens<typename LineProduct<C, KIND>::X>& few,
                int64_t block) {
  constexpr int kInputs = KIND == Codes::table ? 8 : 4;
  const PackedWeight& w = call.packed;
  const LineProduct<C, KIND> product(w.table);
  vf sums[BLOCKS][kRowVectors][TOKENS];
  for (auto& of_block : sums)
    for (auto& of_vector : of_block)
      for (vf& sum : of_vector) sum = zero();

  const uint8_t* line = w.codes + block * w.lines * kLineBytes;
  int64_t input = 0;
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t end = w.groups == 1 ? call.in_features : least(input + w.group_size, call.in_features);
    vf part[BLOCKS][kRowVectors][TOKENS];
    for (auto& of_block : part)
      for (auto& of_vector : of_block)
        for (vf& sum : of_vector) sum = zero();
    for (; input < end; input += kInputs, line += kLineBytes)
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; ++b)
#pragma GCC unroll 4
        for (int v = 0; v < kRowVectors; ++v)
          product.add(part[b][v], load_words(line + b * w.lines * kLineBytes + v * W * 4), few.x + input,
                      few.ld);
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) {
      const RowValues scale = scales_of(w, block + b, group);
#pragma GCC unroll 4
      for (int v = 0; v < kRowVectors; ++v)
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; ++t) sums[b][v][t] = fma(part[b][v][t], scale.v[v], sums[b][v][t]);
      if (w.offsets) {
        const RowValues offset = offsets_of(w, block + b, group);
        for (int v = 0; v < kRowVectors; ++v)
          for (int t = 0; t < TOKENS; ++t)
            sums[b][v][t] = fma(offset.v[v], set1(few.group_sums[t * w.groups + group]), sums[b][v][t]);
      }
    }
  }

  const int tokens = static_cast<int>(call.tokens);
  for (int b = 0; b < BLOCKS; ++b)
    for (int v = 0; v < kRowVectors; ++v) {
      const int64_t o = (block + b) * kLineRows + v * W;
      const int some = static_cast<int>(least(W, call.out_features - o));
      if (some <= 0) continue;
      for (int t = 0; t < tokens; ++t) {
        vf y = sums[b][v][t];
        if (call.bias) y = add(y, load_n(call.bias + o, some));
        if (call.out_scale) y = mul(y, load_n(call.out_scale + o, some));
        if (call.rank > 0) {
          float update[W];
          for (int i = 0; i < W; ++i) {
            vf dot = zero();
            const T* up = static_cast<const T*>(call.up.data) + (o + (i < some ? i : 0)) * call.up.row;
            for (int r = 0; r < call.rank; r += W) {
              const int n = static_cast<int>(least(W, call.rank - r));
              dot = fma(load_n(up + r, n), load_n(few.hidden + t * call.rank + r, n), dot);
            }
            update[i] = sum(dot);
          }
          y = add(y, load(update));
        }
        T* to = static_cast<T*>(call.y.data) + t * call.y.row + o;
        if (some == W)
          store(to, y);
        else
          store_n(to, y, some);
      }
    }
}

// hidden[t][r], rounded into call.hidden and scaled into `kept`
template <class T>
void hidden_value(const LinearCall& call, float* kept, int t, int r) {
  const T* x = static_cast<const T*>(call.x.data) + t * call.x.row;
  const T* down = static_cast<const T*>(call.down.data) + r * call.down.row;
  vf dot[2] = {zero(), zero()};
  int64_t i = 0;
  for (; i + 2 * W <= call.in_features; i += 2 * W)
    for (int half = 0; half < 2; ++half)
      dot[half] = fma(load(x + i + half * W), load(down + i + half * W), dot[half]);
  for (; i < call.in_features; i += W) {
    const int n = static_cast<int>(least(W, call.in_features - i));
    dot[0] = fma(load_n(x + i, n), load_n(down + i, n), dot[0]);
  }
  float h = sum(add(dot[0], dot[1]));
  if (call.relu && h < 0.0f) h = 0.0f;
  if (call.row_adapters && call.row_adapters[t] != call.column_adapters[r]) h = 0.0f;
  T* hidden = static_cast<T*>(call.hidden.data) + t * call.hidden.row + r;
  *hidden = from_float<T>(h);
  kept[t * call.rank + r] = to_float(*hidden) * (call.column_scales ? call.column_scales[r] : call.scale);
}

template <class T, Codes KIND, int TOKENS, int BLOCKS>
bool few_rows(const LinearCall& call) {
  using C = typename ComputeType<T>::type;
  using X = typename LineProduct<C, KIND>::X;
  const PackedWeight& w = call.packed;
  const int64_t ld = round_up(call.in_features, 64);
  const int64_t blocks = (call.out_features + kLineRows - 1) / kLineRows;
  const double weights = static_cast<double>(call.in_features) * static_cast<double>(call.out_features);
  const int threads = weights < kSerialWeights ? 1 : call.threads;
  const int64_t x_bytes = round_up(TOKENS * ld * static_cast<int64_t>(sizeof(X)), 64);
  const int64_t sums_bytes = w.offsets ? round_up(TOKENS * w.groups * 4, 64) : 0;
  char* workspace = take_workspace(x_bytes + sums_bytes + TOKENS * call.rank * 4);
  if (!workspace) return false;
  X* x = reinterpret_cast<X*>(workspace);
  float* group_sums = reinterpret_cast<float*>(workspace + x_bytes);
  float* hidden = reinterpret_cast<float*>(workspace + x_bytes + sums_bytes);
  const FewTokens<X> few{x, ld, group_sums, hidden};
  const int tokens = static_cast<int>(call.tokens);
  for (int t = 0; t < TOKENS; ++t) {
    X* row = x + t * ld;
    if (t < tokens)
      copy_row(row, static_cast<const T*>(call.x.data) + t * call.x.row, 1,
               static_cast<int>(call.in_features), static_cast<int>(ld));
    else
      memset(static_cast<void*>(row), 0, static_cast<size_t>(ld) * sizeof(X));
    for (int64_t group = 0; w.offsets && group < w.groups; ++group) {
      const int64_t begin = group * w.group_size;
      const int64_t end = w.groups == 1 ? call.in_features : least(begin + w.group_size, call.in_features);
      vf sum_of = zero();
      for (int64_t i = begin; i < end; i += W)  // groups of 8 are half a vector
        sum_of = add(sum_of, load_n(row + i, static_cast<int>(least(W, end - i))));
      group_sums[t * w.groups + group] = sum(sum_of);
    }
  }

  run_team(threads, [&](const Team& team) {
    if (call.rank > 0) {
      for (int64_t i = team.id; i < static_cast<int64_t>(tokens) * call.rank; i += team.size)
        hidden_value<T>(call, hidden, static_cast<int>(i / call.rank), static_cast<int>(i % call.rank));
      team.barrier();
    }
    // neighbouring blocks to one thread: it reads one stretch of memory
    int64_t block = blocks * team.id / team.size;
    const int64_t end = blocks * (team.id + 1) / team.size;
    for (; block + BLOCKS <= end; block += BLOCKS) row_blocks<T, C, KIND, TOKENS, BLOCKS>(call, few, block);
    for (; block < end; ++block) row_blocks<T, C, KIND, TOKENS, 1>(call, few, block);
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool linear_rows(const LinearCall& call) {
  return by_dtype(call.dtype, [&](auto x) {
    using T = decltype(x);
    bool done = false;
    by_kind(call.packed.kind, [&](auto kind) {
      constexpr Codes KIND = decltype(kind)::value;
      if (call.tokens <= 1)
        done = few_rows<T, KIND, 1, 4>(call);
      else if (call.tokens <= 2)
        done = few_rows<T, KIND, 2, 4>(call);
      else if (call.tokens <= 4)
        done = few_rows<T, KIND, 4, 2>(call);
      else if (call.tokens <= 8)
        done = few_rows<T, KIND, 8, 1>(call);
      else
        done = few_rows<T, KIND, 16, 1>(call);
    });
    return done;
  });
}

}  // namespace TW_ISA
}  // namespace tw
