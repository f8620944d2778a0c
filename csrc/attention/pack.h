// From strided rows of q, k, v to the tiles that the products read, and back from a tile to rows.
#pragma once

#include "attention/intervals.h"
#include "common/arena.h"
#include "common/by_dtype.h"
#include "common/gemm_tile.h"

namespace tw {
namespace {

// Extents of packed data for one width D of a tensor's last axis, in compute type C.
template <class C>
struct Width {
  int d;         // as in the tensor
  int depth;     // units of a product over d: a multiple of kDepthStep
  int words;     // 32-bit words of a staged row, a multiple of W
  int row;       // elements of a staged row: words * units
  int out_rows;  // d as rows of a product: a multiple of kRowStep
  int lanes;     // d as lanes of a product: a multiple of W

  explicit Width(int width)
      : d(width),
        depth(
            static_cast<int>(round_up((width + Unit<C>::kDepth - 1) / Unit<C>::kDepth, Unit<C>::kDepthStep))),
        words(static_cast<int>(round_up(depth, W))),
        row(words * Unit<C>::kDepth),
        out_rows(static_cast<int>(round_up(width, Unit<C>::kRowStep))),
        lanes(static_cast<int>(round_up(width, W))) {}
};

template <class T>
inline const T* row_of(const View& t, int64_t batch, int64_t row, int head) {
  return static_cast<const T*>(t.data) + batch * t.batch + row * t.row + head * t.head;
}

// TILE rows from `first` on, zeros past `n_rows`, as contiguous C of `width` elements each.
template <int TILE, class C, class T>
inline void stage_rows(C* to, int width, const View& t, int64_t batch, int64_t begin, int64_t first,
                       int64_t n_rows, int head, int d) {
  for (int i = 0; i < TILE; ++i) {
    C* row = to + static_cast<int64_t>(i) * width;
    if (first + i < n_rows)
      copy_row(row, row_of<T>(t, batch, begin + first + i, head), t.lane, d, width);
    else
      memset(row, 0, sizeof(C) * static_cast<size_t>(width));
  }
}

// The same for keys or values: dead keys become zeros, so that nothing in them can reach a result (0 * NaN).
template <int TILE, class C, class T>
inline void stage_key_rows(C* to, int width, const View& t, const Document& doc, int64_t first, int head,
                           int d) {
  stage_rows<TILE, C, T>(to, width, t, doc.batch, doc.k_begin, first, doc.n_k, head, d);
  if (doc.live_begin <= first && first + TILE <= doc.live_end && !doc.live) return;
  for (int i = 0; i < TILE; ++i)
    if (!key_is_live(doc, first + i))
      memset(to + int64_t{i} * width, 0, sizeof(C) * static_cast<size_t>(width));
}

// Row-major tile rows[TILE][lanes] -> its transpose at[lanes][TILE], row-major. `pairs` is scratch of the
// tile's size. In bf16 two rows are interleaved first, so that the transpose moves whole words.
template <int TILE>
inline void transpose_tile(float* at, const float* rows, float*, int lanes) {
  transpose_words(at, TILE, rows, lanes, TILE, lanes);
}
template <int TILE>
inline void transpose_tile(bf16* at, const bf16* rows, bf16* pairs, int lanes) {
  pack_lanes(pairs, rows, lanes, TILE, lanes);
  transpose_words(reinterpret_cast<float*>(at), TILE / 2, reinterpret_cast<const float*>(pairs), lanes,
                  TILE / 2, lanes);
}

// tile[d][lane] * lane_scale[lane] -> rows of a (batch, row, head, lane) tensor, first n of TILE.
// tile has round_up(d, W) rows.
template <int TILE, class T>
inline void store_transposed(const View& t, int64_t batch, int64_t row, int head, const float* tile,
                             const float* lane_scale, int n, int d) {
  T* base = static_cast<T*>(t.data) + batch * t.batch + row * t.row + head * t.head;
  for (int lane = 0; lane < n; lane += W) {
    const vf scale = load(lane_scale + lane);
    const int rows = n - lane < W ? n - lane : W;
    for (int c = 0; c < d; c += W) {
      vf block[W];
      for (int i = 0; i < W; ++i)
        block[i] = mul(load(tile + static_cast<int64_t>(c + i) * TILE + lane), scale);
      transpose(block);
      for (int i = 0; i < rows; ++i) {
        T* to = base + (lane + i) * t.row + c;
        if (d - c >= W)
          store(to, block[i]);
        else
          store_n(to, block[i], d - c);
      }
    }
  }
}

}  // namespace
}  // namespace tw
