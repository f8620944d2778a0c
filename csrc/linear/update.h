// The low-rank update: its inner product, and the panels of its outer one.
#pragma once

#include "common/by_dtype.h"
#include "common/parallel.h"
#include "linear/panels.h"

namespace tw {
namespace {

inline int64_t chunks_of(int64_t depth) { return (depth + kChunk - 1) / kChunk; }

// Pieces of work over several layers, taken one after another by whichever thread is free.
struct Taken {
  int64_t taken = 0;

  int64_t next() { return take_next(&taken); }

  // f(layer, index below count(layer)) for each piece that this thread takes
  template <class Count, class F>
  void each(int n_layers, const Count& count, const F& f) {
    for (;;) {
      int64_t index = next();
      int layer = 0;
      for (; layer < n_layers && index >= count(layer); ++layer) index -= count(layer);
      if (layer == n_layers) return;
      f(layer, index);
    }
  }
};

// Extents of the rank in compute type C.
template <class C>
struct Rank {
  int r;
  int depth;  // units, as depth of a product
  int row;    // elements of a row of that depth
  int lanes;  // as lanes of a product, whole strips
  int used;   // of them, a multiple of W
  int rows;   // as rows of a product

  explicit Rank(int rank)
      : r(rank),
        depth(depth_of<C>(rank)),
        row(depth * Unit<C>::kDepth),
        lanes(static_cast<int>(round_up(rank, kStrip<C>))),
        used(static_cast<int>(round_up(rank, W))),
        rows(static_cast<int>(round_up(rank, Unit<C>::kRowStep))) {}
};

// A whole right side packed ahead: chunks of kChunk depth, strips within.
template <class C>
struct PackedRight {
  C* data;
  int lanes;  // whole strips
  int used;   // lanes that count, a multiple of W

  int64_t elements(int64_t depth) const { return round_up(depth, kChunk) * lanes; }
  C* strip(int64_t k0, int s) const { return data + k0 * lanes + s * kStripElements<C>; }
};

// Packs chunk `k0` of a right side.
template <class C, class Right>
inline void pack_chunk(const PackedRight<C>& to, const Right& right, int64_t depth, int64_t k0, C* staged) {
  const int k = static_cast<int>(least(kChunk, depth - k0));
  right.build({to.strip(k0, 0), kStripElements<C>, staged}, 0, to.lanes / kStrip<C>, k0, k);
}

template <class C>
inline void add_chunk(float* sums, const C* left, const PackedRight<C>& right, int64_t k0, int k, int rows) {
  for (int s = 0; s * kStrip<C> < right.used; ++s) {
    float* c = sums + s * kStrip<C>;
    const int lanes = static_cast<int>(least(kStrip<C>, right.used - s * kStrip<C>));
    if (k0 == 0)
      gemm<C, Start::zero>(rows, lanes, depth_of<C>(k), left, kLeftRow, right.strip(k0, s), kStrip<C>, c,
                           right.lanes);
    else
      gemm<C, Start::add_to>(rows, lanes, depth_of<C>(k), left, kLeftRow, right.strip(k0, s), kStrip<C>, c,
                             right.lanes);
  }
}

// sums[row][lane] (right.lanes apart) of a block of tokens with a right side that is packed.
template <class T, class C>
inline void narrow_product(float* sums, const Tokens<T, C>& left, const PackedRight<C>& right, int64_t depth,
                           int64_t t0, int rows, C* left_block) {
  for (int64_t k0 = 0; k0 < most(depth, 1); k0 += kChunk) {
    const int k = static_cast<int>(least(kChunk, depth - k0));
    left.fill(left_block, t0, rows, k0, k);
    add_chunk(sums, left_block, right, k0, k, static_cast<int>(round_up(rows, Unit<C>::kRowStep)));
  }
}
template <class C>
inline void narrow_product(float* sums, const PackedLeft<C>& left, const PackedRight<C>& right, int64_t depth,
                           int64_t t0, int rows) {
  for (int64_t k0 = 0; k0 < most(depth, 1); k0 += kChunk)
    add_chunk(sums, left.block(k0, t0), right, k0, static_cast<int>(least(kChunk, depth - k0)),
              static_cast<int>(round_up(rows, Unit<C>::kRowStep)));
}

// Whether column r of the hidden values belongs to another adapter than token t.
inline bool is_of_another(const LinearCall& call, int64_t t, int r) {
  return call.row_adapters && call.row_adapters[t] != call.column_adapters[r];
}

// hidden = f(down drop(x)) of a block, from its sums: rounded into call.hidden, and scaled by column_scales
// into `kept` (rows of rank.row, zeros past the rank) for the outer product. `kept` begins at token `begin`.
template <class T, class C>
inline void settle_hidden(const LinearCall& call, const Rank<C>& rank, const float* sums, int64_t ld,
                          int64_t begin, int64_t t0, int rows, C* kept) {
  for (int i = 0; i < rows; ++i) {
    const int64_t t = begin + t0 + i;
    T* hidden = out_at<T>(call.hidden, t, 0);
    C* row = kept + (t0 + i) * rank.row;
    for (int r = 0; r < rank.r; ++r) {
      float h = sums[i * ld + r];
      if (call.relu && h < 0.0f) h = 0.0f;
      if (is_of_another(call, t, r)) h = 0.0f;
      hidden[r] = from_float<T>(h);
      h = to_float(hidden[r]);
      row[r] = from_float<C>(call.column_scales ? h * call.column_scales[r] : h);
    }
    for (int r = rank.r; r < rank.row; ++r) row[r] = from_float<C>(0.0f);
  }
}

}  // namespace
}  // namespace tw
