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

// to[column][t] for the columns from `column` on, tokens side by side, `ld` of them, zeros past n_tokens.
template <class C, class T>
inline void turn_tokens(C* to, int64_t ld, const Rows& rows, int64_t t0, int64_t n_tokens, int64_t column,
                        int64_t n_columns) {
  for (int64_t t = 0; t < ld; t += W)
    for (int64_t c = 0; c < n_columns; c += W) {
      const int some = static_cast<int>(least(W, n_columns - c));
      vf square[W];
      for (int i = 0; i < W; ++i) {
        if (t + i >= n_tokens) {
          square[i] = zero();
          continue;
        }
        const T* at = row_at<T>(rows, t0 + t + i, column + c);
        square[i] = some == W ? load(at) : load_n(at, some);
      }
      transpose(square);
      for (int i = 0; i < some; ++i) store(to + (c + i) * ld + t, square[i]);
    }
}

// Tokens times the rows of a sparse matrix, block by block as the panels' sums are.
template <class T>
struct DeltaProduct {
  const int64_t* offsets;  // of each row
  DeltaEntry* entries;
  T* turned;             // [block][column][token]
  const int32_t* order;  // which row a lane is, or nullptr: its own
  int64_t columns;

  static constexpr int64_t kBlocksOfItem = (kTokensOfItem + kBlock - 1) / kBlock;
  static constexpr int kVectors = kBlock / W % 3 == 0 ? 3 : 2;  // of tokens, summed up at once
  static constexpr int64_t kColumnsAtOnce = 512;
  static_assert(kBlock % (kVectors * W) == 0, "a block is whole vectors");

  static int64_t block_of(int64_t t) {
    return t / kTokensOfItem * kBlocksOfItem + t % kTokensOfItem / kBlock;
  }

  void lay_out(Arena& arena, int64_t n, int64_t tokens) {
    const int64_t last = least(tokens, kTokensAtOnce) - 1;
    entries = arena.take<DeltaEntry>(n);
    turned = arena.take<T>(tokens > 0 ? (block_of(last) + 1) * columns * kBlock : 0);
  }

  // Entries as they stand in the rows; `part` of `parts`.
  void read(const SparseDelta& d, int64_t n_rows, int part, int parts) const {
    const int64_t n = d.offsets[n_rows];
    with_delta_types(d, [&](const auto* at, const auto* values) {
      for (int64_t i = n * part / parts; i < n * (part + 1) / parts; ++i)
        entries[i] = {static_cast<int32_t>(at[i]), to_float(values[i])};
    });
  }

  // Turns the `piece`-th part of n_tokens tokens from `begin` on; returns false past the last.
  bool turn(const Rows& rows, int64_t begin, int64_t n_tokens, int64_t piece) const {
    const int64_t chunks = (columns + kColumnsAtOnce - 1) / kColumnsAtOnce;
    if (chunks == 0 || piece / chunks > block_of(n_tokens - 1)) return false;
    const int64_t block = piece / chunks, c = piece % chunks * kColumnsAtOnce;
    const int64_t t = block / kBlocksOfItem * kTokensOfItem + block % kBlocksOfItem * kBlock;
    const int64_t item_end = round_up(t + 1, kTokensOfItem);
    turn_tokens<T, T>(turned + (block * columns + c) * kBlock, kBlock, rows, begin + t,
                      least(kBlock, least(item_end, n_tokens) - t), c, least(kColumnsAtOnce, columns - c));
    return true;
  }

  // to[t][n], `ld` apart: the block of tokens that begins at t0 of those turned, times `n_rows` rows from
  // `row` on; zeros up to whole vectors.
  void tile(float* to, int64_t ld, int64_t t0, int64_t row, int64_t n_rows) const {
    const T* x = turned + block_of(t0) * columns * kBlock;
    alignas(64) float sums[W * kBlock];  // [row][token]
    for (int64_t n = 0; n < n_rows; n += W) {
      for (int i = 0; i < W; ++i) {
        const int64_t lane = row + n + i, o = n + i < n_rows ? order ? order[lane] : lane : -1;
        add_up_row(sums + i * kBlock, x, o < 0 ? 0 : offsets[o], o < 0 ? 0 : offsets[o + 1]);
      }
      for (int t = 0; t < kBlock; t += W) {
        vf square[W];
        for (int i = 0; i < W; ++i) square[i] = load(sums + i * kBlock + t);
        transpose(square);
        for (int i = 0; i < W; ++i) store(to + (t + i) * ld + n, square[i]);
      }
    }
  }

  void add_up_row(float* to, const T* x, int64_t begin, int64_t end) const {
    for (int t = 0; t < kBlock; t += kVectors * W) {
      vf even[kVectors], odd[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) even[v] = odd[v] = zero();
      int64_t n = begin;
      for (; n + 1 < end; n += 2) {
        add_entry(even, x + t, entries[n]);
        add_entry(odd, x + t, entries[n + 1]);
      }
      if (n < end) add_entry(even, x + t, entries[n]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(to + t + v * W, add(even[v], odd[v]));
    }
  }

  [[gnu::always_inline]] static void add_entry(vf (&sums)[kVectors], const T* x, const DeltaEntry& entry) {
    const T* at = x + static_cast<int64_t>(entry.column) * kBlock;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[v] = fma(set1(entry.value), load(at + v * W), sums[v]);
  }
};

}  // namespace
}  // namespace tw
