// The product of tokens with a sparse matrix, beside the panels of the dense one.
//
// Lanes are tokens: with x turned so that the tokens of a block lie side by side, each value of D is one
// broadcast, and its column one stretch of memory to multiply and add.
#pragma once

#include "linear/panels.h"

namespace tw {
namespace {

// A value in the one form that kernels read, whatever the types of the call's.
struct DeltaEntry {
  int32_t column;
  float value;
};

// f(columns, values) with the pointers in their types.
template <class F>
inline void with_delta_types(const SparseDelta& d, const F& f) {
  const auto with_columns = [&](auto* columns) {
    if (d.short_values)
      f(columns, static_cast<const bf16*>(d.values));
    else
      f(columns, static_cast<const float*>(d.values));
  };
  if (d.short_columns)
    with_columns(static_cast<const uint16_t*>(d.columns));
  else
    with_columns(static_cast<const int32_t*>(d.columns));
}

// Entries of the transpose of D by D's columns, each value times the factor of its row: offsets (I + 1).
inline void transpose_delta(const SparseDelta& d, const float* factors, int64_t n_out, int64_t n_in,
                            int64_t* offsets, DeltaEntry* entries) {
  const int64_t n = d.offsets[n_out];
  fill_zero(offsets, n_in + 1);
  with_delta_types(d, [&](const auto* columns, const auto* values) {
    for (int64_t i = 0; i < n; ++i) ++offsets[columns[i] + 1];
    for (int64_t c = 0; c < n_in; ++c) offsets[c + 1] += offsets[c];
    for (int64_t o = 0; o < n_out; ++o) {
      const float factor = factors ? factors[o] : 1.0f;
      for (int64_t i = d.offsets[o]; i < d.offsets[o + 1]; ++i)
        entries[offsets[columns[i]]++] = {static_cast<int32_t>(o), to_float(values[i]) * factor};
    }
  });
  // each offset has moved to the next one's place
  for (int64_t c = n_in; c > 0; --c) offsets[c] = offsets[c - 1];
  offsets[0] = 0;
}

// Tokens times the rows of a sparse matrix, in steps along the tokens of an item.
template <class T>
struct DeltaProduct {
  const int64_t* offsets;  // of each row
  const int32_t* order;    // which row a lane is, or nullptr: its own
  int64_t n_rows, columns;
  DeltaEntry* entries = nullptr;
  T* turned = nullptr;  // [step][column][token]

  static constexpr int kTokens = kDeltaTokens;
  static constexpr int64_t kStepsOfItem = (kTokensOfItem + kTokens - 1) / kTokens;
  static constexpr int64_t kColumnsAtOnce = 512;

  static int64_t step_of(int64_t t) { return t / kTokensOfItem * kStepsOfItem + t % kTokensOfItem / kTokens; }

  void lay_out(Arena& arena, int64_t n, int64_t tokens) {
    const int64_t steps = tokens > 0 ? step_of(least(tokens, kTokensAtOnce) - 1) + 1 : 0;
    entries = arena.take<DeltaEntry>(n);
    turned = arena.take<T>(steps * columns * kTokens);
  }

  // Entries as they stand in the rows; `part` of `parts`.
  void read(const SparseDelta& d, int part, int parts) const {
    const int64_t n = d.offsets[n_rows];
    with_delta_types(d, [&](const auto* at, const auto* values) {
      for (int64_t i = n * part / parts; i < n * (part + 1) / parts; ++i)
        entries[i] = {static_cast<int32_t>(at[i]), to_float(values[i])};
    });
  }

  // How many parts n_tokens tokens are turned in.
  int64_t pieces(int64_t n_tokens) const { return chunks() * (step_of(n_tokens - 1) + 1); }

  // Turns one of them, of the tokens from `begin` on.
  void turn(const Rows& from, int64_t begin, int64_t n_tokens, int64_t piece) const {
    const int64_t step = piece / chunks(), c = piece % chunks() * kColumnsAtOnce;
    const int64_t t = step / kStepsOfItem * kTokensOfItem + step % kStepsOfItem * kTokens;
    const int64_t end = least(round_up(t + 1, kTokensOfItem), n_tokens);
    turn_rows(turned + (step * columns + c) * kTokens, kTokens, row_at<T>(from, begin + t, c), from.row,
              least(kTokens, end - t), least(kColumnsAtOnce, columns - c));
  }

  // Makes the sums of a panel's lanes, if a step begins with token t of those turned.
  void begin_block(float* sums, int64_t t, int64_t n0, int lanes) const {
    if (t % kTokensOfItem % kTokens != 0) return;
    const T* x = turned + step_of(t) * columns * kTokens;
    alignas(64) float found[W * kTokens];  // [row][place of a token]
    for (int n = 0; n < lanes; n += W) {
      for (int i = 0; i < W; ++i) {
        const int64_t lane = n0 + n + i, row = n + i >= lanes ? -1 : order ? order[lane] : lane;
        for (int at = 0; at < kTokens; at += kVectors * W)
          add_up_row(found + i * kTokens + at, x + at, row < 0 ? 0 : offsets[row],
                     row < 0 ? 0 : offsets[row + 1]);
      }
      for (int at = 0; at < kTokens; at += W) {
        vf square[W];
        for (int i = 0; i < W; ++i) square[i] = load(found + i * kTokens + at);
        transpose(square);
        for (int i = 0; i < W; ++i) store(sums + n * kTokens + token_at(at + i) * W, square[i]);
      }
    }
  }

  // The sums of token t of those turned, from lane n of the panel on: a multiple of W.
  static vf sums_at(const float* sums, int64_t t, int n) {
    return load(sums + n * kTokens + t % kTokensOfItem % kTokens * W);
  }

 private:
  int64_t chunks() const { return (columns + kColumnsAtOnce - 1) / kColumnsAtOnce; }

  // of tokens, summed up at once
  static constexpr int kVectors = kTokens / W % 4 == 0 ? 4 : kTokens / W % 2 == 0 ? 2 : 3;
  static_assert(kTokens % (kVectors * W) == 0, "whole vectors");

  // bf16 is taken two vectors at once: even tokens, then odd ones
  static constexpr bool kInPairs = wide_place<T>(1) != 1;
  static int token_at(int place) {
    const int at = place % (kVectors * W);
    if (!kInPairs || at >= kVectors / 2 * 2 * W) return place;
    return place - at + at / (2 * W) * (2 * W) + at % W * 2 + at % (2 * W) / W;
  }

  void add_up_row(float* to, const T* x, int64_t begin, int64_t end) const {
    vf even[kVectors], odd[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) even[v] = odd[v] = zero();
    int64_t n = begin;
    for (; n + 1 < end; n += 2) {
      add_entry(even, x, entries[n]);
      add_entry(odd, x, entries[n + 1]);
    }
    if (n < end) add_entry(even, x, entries[n]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(to + v * W, add(even[v], odd[v]));
  }

  [[gnu::always_inline]] static void add_entry(vf (&to)[kVectors], const T* x, const DeltaEntry& entry) {
    const T* column = x + int64_t{entry.column} * kTokens;
    const vf value = set1(entry.value);
    constexpr int kPaired = kInPairs ? kVectors / 2 * 2 : 0;
#pragma GCC unroll 2
    for (int v = 0; v < kPaired; v += 2) {
      vf first, second;
      load_wide(column + v * W, first, second);
      to[v] = fma(value, first, to[v]);
      to[v + 1] = fma(value, second, to[v + 1]);
    }
#pragma GCC unroll 4
    for (int v = kPaired; v < kVectors; ++v) to[v] = fma(value, load(column + v * W), to[v]);
  }
};

}  // namespace
}  // namespace tw
