// Forward for a few tokens: the weight is read once, and each piece meets every token. Lines of codes are
// decoded in registers; nothing decoded is stored. byte_rows_cpu.cpp does the same in whole numbers.
#include "common/by_dtype.h"
#include "linear/eight_bits.h"
#include "linear/few_tokens.h"

namespace tw {
namespace {

// The tokens as the kernels read them: rows of `ld`, zeros past I and past the last token.
template <class X, int TOKENS>
struct FewTokens {
  static constexpr int count = TOKENS;
  X* x;
  int64_t ld;
  float* group_sums;  // (tokens, groups) sums of x, for offsets
  float* row_scales;  // (tokens) factors of the base product

  void lay_out(Arena& arena, const LinearCall& call) {
    ld = round_up(call.in_features, kRowUnit);
    x = arena.take<X>(TOKENS * ld);
    group_sums = arena.take<float>(has_offsets(call) ? TOKENS * call.packed.groups : 0);
    row_scales = arena.take<float>(TOKENS);
  }

  static bool has_offsets(const LinearCall& call) { return !call.weight.data && call.packed.offsets; }

  template <class T>
  void pack(const LinearCall& call, int t, const T* from) const {
    X* row = x + t * ld;
    const int64_t n = call.in_features;
    row_scales[t] = 1.0f;
    if (!from) {
      memset(static_cast<void*>(row), 0, static_cast<size_t>(ld) * sizeof(X));
      return;
    }
    copy_row(row, from, 1, static_cast<int>(n), static_cast<int>(ld));
    if (call.int8_activations) {
      row_scales[t] = eight_bit_scale(from, n);
      round_to_codes(row, n, row_scales[t]);
    }
    const PackedWeight& w = call.packed;
    for (int64_t group = 0; has_offsets(call) && group < w.groups; ++group) {
      const int64_t begin = group * w.group_size, end = w.groups == 1 ? n : least(begin + w.group_size, n);
      vf sum_of = zero();
      for (int64_t i = begin; i < end; i += W)
        sum_of = add(sum_of, load_n(row + i, static_cast<int>(least(W, end - i))));
      group_sums[t * w.groups + group] = sum(sum_of);
    }
  }
};

// W units of a dense row, as the products of type C take them
template <class C, class T>
[[gnu::always_inline]] inline auto dense_lanes(const T* row) {
  if constexpr (sizeof(C) == sizeof(T))
    return Unit<C>::lanes(reinterpret_cast<const C*>(row));
  else
    return load(row);  // converted to float
}

// y of BLOCKS row blocks from `block` on.
template <class T, Codes KIND, int TOKENS, int BLOCKS>
void row_blocks(const LinearCall& call, const FewTokens<float, TOKENS>& few, const float* hidden,
                int64_t block) {
  constexpr int kInputs = line_inputs(KIND);
  const PackedWeight& w = call.packed;
  const Table table(w.table);
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
        for (int v = 0; v < kRowVectors; ++v) {
          const vi words = load_words(line + b * w.lines * kLineBytes + v * W * 4);
          each_input<KIND>([&](auto at) {
            constexpr int K = decltype(at)::value;
            const vf value = line_value<KIND, K>(table, words);
#pragma GCC unroll 16
            for (int t = 0; t < TOKENS; ++t)
              part[b][v][t] = fma(value, set1(few.x[t * few.ld + input + K]), part[b][v][t]);
          });
        }
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
        finish_outputs<T>(call, hidden, t, (block + b) * kLineRows + v * W,
                          mul(sums[b][v][t], set1(few.row_scales[t])));
}

// y of kDots dense rows from `o` on, each read once.
constexpr int kDots = 4;
template <class T, class C, int TOKENS>
void dense_dots(const LinearCall& call, const FewTokens<C, TOKENS>& few, int64_t o,
                float (&dots)[TOKENS][kDots]) {
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

template <class T, Codes KIND, int TOKENS, int BLOCKS>
bool packed_rows(const LinearCall& call) {
  using Few = FewTokens<float, TOKENS>;
  return with_few_tokens<T>(call, Few{}, [&](const Few& few, const float* hidden, const Team& team) {
    share_blocks<BLOCKS>(call, team, [&](auto blocks, int64_t block) {
      row_blocks<T, KIND, TOKENS, decltype(blocks)::value>(call, few, hidden, block);
    });
  });
}

template <class T, int TOKENS>
bool dense_rows(const LinearCall& call) {
  using C = typename ComputeType<T>::type;
  using Few = FewTokens<C, TOKENS>;
  return with_few_tokens<T>(call, Few{}, [&](const Few& few, const float* hidden, const Team& team) {
    const int64_t steps = (call.out_features + W - 1) / W;
    for (int64_t step = steps * team.id / team.size; step < steps * (team.id + 1) / team.size; ++step) {
      float sums[TOKENS][W], dots[TOKENS][kDots];
      for (int o = 0; o < W; o += kDots) {
        dense_dots<T, C, TOKENS>(call, few, step * W + o, dots);
        for (int t = 0; t < TOKENS; ++t) memcpy(sums[t] + o, dots[t], sizeof(dots[t]));
      }
      for (int t = 0; t < static_cast<int>(call.tokens); ++t)
        finish_outputs<T>(call, hidden, t, step * W, load(sums[t]));
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
