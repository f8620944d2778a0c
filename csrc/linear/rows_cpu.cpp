// Forward for a few tokens: the weight is read once, and each piece meets every token. Lines of codes are
// decoded in registers; nothing decoded is stored.
#include "common/arena.h"
#include "common/by_dtype.h"
#include "common/packed_lines.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "linear/eight_bits.h"

namespace tw {
namespace {

constexpr int64_t kRowUnit = 64;  // elements that rows of tokens are padded to: whole lines, whole vectors

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
  const float* row_scales;  // (tokens) factors of the base product, or nullptr
};

// y of W outputs from `o` on, of token t, from their base sums.
template <class T>
void finish_outputs(const LinearCall& call, const float* all_hidden, const float* row_scales, int t,
                    int64_t o, vf y) {
  const int some = static_cast<int>(least(W, call.out_features - o));
  if (some <= 0) return;
  if (row_scales) y = mul(y, set1(row_scales[t]));
  if (call.delta_sums) y = add(y, load_n(call.delta_sums + t * call.out_features + o, some));
  if (call.bias) y = add(y, load_n(call.bias + o, some));
  if (call.out_scale) y = mul(y, load_n(call.out_scale + o, some));
  if (call.rank > 0) {
    const float* hidden = all_hidden + t * call.rank;
    float update[W];
    for (int i = 0; i < W; ++i) {
      vf dot = zero();
      const T* up = static_cast<const T*>(call.up.data) + (o + (i < some ? i : 0)) * call.up.row;
      for (int r = 0; r < call.rank; r += W) {
        const int n = static_cast<int>(least(W, call.rank - r));
        dot = fma(load_n(up + r, n), load_n(hidden + r, n), dot);
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

// W units of a dense row, as the products of type C take them
template <class C, class T>
[[gnu::always_inline]] inline auto dense_lanes(const T* row) {
  if constexpr (sizeof(C) == sizeof(T))
    return Unit<C>::lanes(reinterpret_cast<const C*>(row));
  else
    return load(row);  // converted to float
}

// y of BLOCKS row blocks from `block` on.
template <class T, class C, Codes KIND, int TOKENS, int BLOCKS>
void row_blocks(const LinearCall& call, const FewTokens<typename LineProduct<C, KIND>::X>& few,
                int64_t block) {
  constexpr int kInputs = line_inputs(KIND);
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

  for (int b = 0; b < BLOCKS; ++b)
    for (int v = 0; v < kRowVectors; ++v)
      for (int t = 0; t < static_cast<int>(call.tokens); ++t)
        finish_outputs<T>(call, few.hidden, few.row_scales, t, (block + b) * kLineRows + v * W,
                          sums[b][v][t]);
}

// y of kDots dense rows from `o` on, each read once.
constexpr int kDots = 4;
template <class T, class C, int TOKENS>
void dense_dots(const LinearCall& call, const FewTokens<C>& few, int64_t o, float (&dots)[TOKENS][kDots]) {
  constexpr int kStep = W * Unit<C>::kDepth;
  const int64_t n = call.in_features, whole = n / kStep * kStep;
  const T* rows[kDots];
  for (int d = 0; d < kDots; ++d)
    rows[d] = static_cast<const T*>(call.weight.data) + least(o + d, call.out_features - 1) * call.weight.row;
  vf sums[kDots][TOKENS];
  for (auto& of_row : sums)
    for (vf& sum : of_row) sum = zero();
  for (int64_t i = 0; i < whole; i += kStep)
#pragma GCC unroll 4
    for (int d = 0; d < kDots; ++d) {
      const auto row = dense_lanes<C>(rows[d] + i);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t)
        sums[d][t] = Unit<C>::mac(sums[d][t], Unit<C>::lanes(few.x + t * few.ld + i), row);
    }
  for (int d = 0; d < kDots; ++d)
    for (int t = 0; t < TOKENS; ++t) {
      vf tail = zero();
      for (int64_t i = whole; i < n; i += W) {
        const int some = static_cast<int>(least(W, n - i));
        tail = fma(load_n(few.x + t * few.ld + i, some), load_n(rows[d] + i, some), tail);
      }
      dots[t][d] = sum(add(sums[d][t], tail));
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

// f(few tokens, team) on all threads, once x and hidden are there.
template <class T, class X, int TOKENS, class F>
bool with_few_tokens(const LinearCall& call, const F& f) {
  const PackedWeight& w = call.packed;
  const bool has_offsets = !call.weight.data && w.offsets;
  const int64_t ld = round_up(call.in_features, kRowUnit), n = call.in_features;
  const double weights = static_cast<double>(n) * static_cast<double>(call.out_features);
  const int threads = weights < kSerialWeights ? 1 : call.threads;
  X* x;
  float *group_sums, *row_scales, *hidden;
  const auto lay_out = [&](char* base) {
    Arena arena{base};
    x = arena.take<X>(TOKENS * ld);
    group_sums = arena.take<float>(has_offsets ? TOKENS * w.groups : 0);
    row_scales = arena.take<float>(TOKENS);
    hidden = arena.take<float>(TOKENS * call.rank);
    return arena.at - base;
  };
  char* workspace = take_workspace(lay_out(nullptr));
  if (!workspace) return false;
  lay_out(workspace);
  const FewTokens<X> few{x, ld, group_sums, hidden, call.int8_activations ? row_scales : nullptr};
  const int tokens = static_cast<int>(call.tokens);
  for (int t = 0; t < TOKENS; ++t) {
    X* row = x + t * ld;
    if (t >= tokens) {
      memset(static_cast<void*>(row), 0, static_cast<size_t>(ld) * sizeof(X));
      continue;
    }
    const T* from = static_cast<const T*>(call.x.data) + t * call.x.row;
    copy_row(row, from, 1, static_cast<int>(n), static_cast<int>(ld));
    if (call.int8_activations) {
      row_scales[t] = eight_bit_scale(from, n);
      round_to_codes(row, n, row_scales[t]);
    }
    for (int64_t group = 0; has_offsets && group < w.groups; ++group) {
      const int64_t begin = group * w.group_size, end = w.groups == 1 ? n : least(begin + w.group_size, n);
      vf sum_of = zero();
      for (int64_t i = begin; i < end; i += W)
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
    f(few, team);
  });
  give_workspace(workspace);
  return true;
}

template <class T, Codes KIND, int TOKENS, int BLOCKS>
bool packed_rows(const LinearCall& call) {
  using C = typename ComputeType<T>::type;
  using X = typename LineProduct<C, KIND>::X;
  return with_few_tokens<T, X, TOKENS>(call, [&](const FewTokens<X>& few, const Team& team) {
    // neighbouring blocks to one thread: it reads one stretch of memory
    const int64_t blocks = (call.out_features + kLineRows - 1) / kLineRows;
    int64_t block = blocks * team.id / team.size;
    const int64_t end = blocks * (team.id + 1) / team.size;
    for (; block + BLOCKS <= end; block += BLOCKS) row_blocks<T, C, KIND, TOKENS, BLOCKS>(call, few, block);
    for (; block < end; ++block) row_blocks<T, C, KIND, TOKENS, 1>(call, few, block);
  });
}

template <class T, int TOKENS>
bool dense_rows(const LinearCall& call) {
  using C = typename ComputeType<T>::type;
  return with_few_tokens<T, C, TOKENS>(call, [&](const FewTokens<C>& few, const Team& team) {
    const int64_t steps = (call.out_features + W - 1) / W;
    for (int64_t step = steps * team.id / team.size; step < steps * (team.id + 1) / team.size; ++step) {
      float sums[TOKENS][W], dots[TOKENS][kDots];
      for (int o = 0; o < W; o += kDots) {
        dense_dots<T, C, TOKENS>(call, few, step * W + o, dots);
        for (int t = 0; t < TOKENS; ++t) memcpy(sums[t] + o, dots[t], sizeof(dots[t]));
      }
      for (int t = 0; t < static_cast<int>(call.tokens); ++t)
        finish_outputs<T>(call, few.hidden, nullptr, t, step * W, load(sums[t]));
    }
  });
}

}  // namespace

namespace TW_ISA {

bool linear_rows(const LinearCall& call) {
  return by_dtype(call.dtype, [&](auto x) {
    using T = decltype(x);
    if (call.weight.data) {
      if (call.tokens <= 1) return dense_rows<T, 1>(call);
      if (call.tokens <= 2) return dense_rows<T, 2>(call);
      return dense_rows<T, 4>(call);
    }
    bool done = false;
    by_kind(call.packed.kind, [&](auto kind) {
      constexpr Codes KIND = decltype(kind)::value;
      if (call.tokens <= 1)
        done = packed_rows<T, KIND, 1, 4>(call);
      else if (call.tokens <= 2)
        done = packed_rows<T, KIND, 2, 4>(call);
      else if (call.tokens <= 4)
        done = packed_rows<T, KIND, 4, 2>(call);
      else if (call.tokens <= 8)
        done = packed_rows<T, KIND, 8, 1>(call);
      else
        done = packed_rows<T, KIND, 16, 1>(call);
    });
    return done;
  });
}

}  // namespace TW_ISA
}  // namespace tw
