// Small matrix products on packed tiles, and the packing.
//
//   C[m][n] (float)  =  sum_k A[m][k] B[k][n]
//
// A is row-major and is broadcast element by element (pair by pair in bf16), B is packed as lanes:
//   float  B[k][n]                      row-major
//   bf16   B[k / 2][n][2]               rows 2 k and 2 k + 1 interleaved
// so one microkernel serves every product of an attention tile, forward and backward. With a matrix unit the
// products of bf16 are its own.
#pragma once

#include "common/extents.h"
#include "common/matrix_unit.h"
#include "common/vec.h"

namespace tw {
namespace {

enum class Start { zero, add_to, rescale };  // C = AB,  C += AB,  C = C * lane_scale[n] + AB

// ROWS x (VECTORS * W) of C. depth counts units (elements or pairs) of k; ldb counts lanes.
// AB is summed up from 0 and meets the old C once: on top of a C that already holds a thousand terms, each
// product would be rounded to C's last place.
template <class C, int ROWS, int VECTORS, Start START>
inline void micro_gemm(int depth, const C* a, int64_t lda, const C* b, int64_t ldb, float* c, int64_t ldc,
                       const float* lane_scale) {
  using U = Unit<C>;
  vf acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[r][v] = zero();
  for (int k = 0; k < depth; ++k) {
    decltype(U::lanes(b)) lanes[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) lanes[v] = U::lanes(b + v * W * U::kDepth);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const auto one = U::broadcast(a + r * lda + k * U::kDepth);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) acc[r][v] = U::mac(acc[r][v], one, lanes[v]);
    }
    b += ldb * U::kDepth;
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      float* at = c + r * ldc + v * W;
      if constexpr (START == Start::zero) store(at, acc[r][v]);
      if constexpr (START == Start::add_to) store(at, add(load(at), acc[r][v]));
      if constexpr (START == Start::rescale) store(at, fma(load(at), load(lane_scale + v * W), acc[r][v]));
    }
}

template <class C, int VECTORS, Start START>
inline void gemm_strip(int rows, int depth, const C* a, int64_t lda, const C* b, int64_t ldb, float* c,
                       int64_t ldc, const float* lane_scale) {
  // six rows load the least for a product, where the registers hold their sums; the rest is four or eight
  const int by_six = VECTORS == 4 ? rows / 12 * 12 : 0;
  int r = 0;
  for (; r < by_six; r += 6)
    micro_gemm<C, 6, VECTORS, START>(depth, a + r * lda, lda, b, ldb, c + r * ldc, ldc, lane_scale);
  for (; r < rows; r += 4)
    micro_gemm<C, 4, VECTORS, START>(depth, a + r * lda, lda, b, ldb, c + r * ldc, ldc, lane_scale);
}

// By the matrix unit, in blocks of 2 x 2 tiles, fewer at the edges. Its sums continue an old C: bf16 results
// are rounded so much more coarsely than float sums that a second pass over C would buy nothing.
template <class C, Start START>
inline void unit_gemm(int rows, int lanes, int depth, const C* a, int64_t lda, const C* b, int64_t ldb,
                      float* c, int64_t ldc, const float* lane_scale) {
  constexpr bool kAdds = START != Start::zero;
  if constexpr (START == Start::rescale)
    for (int r = 0; r < rows; ++r)
      for (int n = 0; n < lanes; n += W)
        store(c + r * ldc + n, mul(load(c + r * ldc + n), load(lane_scale + n)));
  for (int n = 0; n < lanes; n += 2 * kUnitTile)
    for (int r = 0; r < rows; r += 2 * kUnitTile) {
      const C *a_block = a + r * lda, *b_block = b + n * Unit<C>::kDepth;
      float* c_block = c + r * ldc + n;
      const bool two_rows = rows - r > kUnitTile, two_lanes = lanes - n > kUnitTile;
      if (two_rows && two_lanes)
        unit_product<2, 2, kAdds>(depth, a_block, lda, b_block, ldb, c_block, ldc);
      else if (two_rows)
        unit_product<2, 1, kAdds>(depth, a_block, lda, b_block, ldb, c_block, ldc);
      else if (two_lanes)
        unit_product<1, 2, kAdds>(depth, a_block, lda, b_block, ldb, c_block, ldc);
      else
        unit_product<1, 1, kAdds>(depth, a_block, lda, b_block, ldb, c_block, ldc);
    }
}

// rows and depth: multiples of what Unit<C> says; lanes: a multiple of W, at most ldb and ldc; depth in units
// of C. lane_scale belongs to Start::rescale.
template <class C, Start START>
inline void gemm(int rows, int lanes, int depth, const C* a, int64_t lda, const C* b, int64_t ldb, float* c,
                 int64_t ldc, const float* lane_scale = nullptr) {
  if constexpr (kHasMatrixUnit && Unit<C>::kDepth == 2) {
    unit_gemm<C, START>(rows, lanes, depth, a, lda, b, ldb, c, ldc, lane_scale);
  } else {
    constexpr int kStep = kMicroVectors * W;
    int n = 0;
    for (; n + kStep <= lanes; n += kStep)
      gemm_strip<C, kMicroVectors, START>(rows, depth, a, lda, b + n * Unit<C>::kDepth, ldb, c + n, ldc,
                                          lane_scale + n);
    if constexpr (kMicroVectors > 2)
      for (; n + 2 * W <= lanes; n += 2 * W)
        gemm_strip<C, 2, START>(rows, depth, a, lda, b + n * Unit<C>::kDepth, ldb, c + n, ldc,
                                lane_scale + n);
    for (; n < lanes; n += W)
      gemm_strip<C, 1, START>(rows, depth, a, lda, b + n * Unit<C>::kDepth, ldb, c + n, ldc, lane_scale + n);
  }
}

// One row of `n` elements at any stride -> contiguous C, zeros up to `padded`.
template <class C, class T>
inline void copy_row(C* to, const T* from, int64_t stride, int n, int padded) {
  int i = 0;
  if (stride == 1) {
    if constexpr (sizeof(C) == sizeof(T)) {  // no conversion: float from float, bf16 from bf16
      memcpy(to, from, sizeof(C) * static_cast<size_t>(n));
      i = n;
    } else {
      for (; i + W <= n; i += W) store(to + i, load(from + i));
      if (i < n) {
        store_n(to + i, load_n(from + i, n - i), n - i);
        i = n;
      }
    }
  } else {
    for (; i < n; ++i) to[i] = from_float<C>(to_float(from[i * stride]));
  }
  for (; i < padded; ++i) to[i] = from_float<C>(0.0f);
}

// to[c][r] = from[r][c], rows of `to` ld apart: any numbers of rows and columns, zeros from n_rows up to ld,
// which is a multiple of W.
template <class C, class T>
inline void turn_rows(C* to, int64_t ld, const T* from, int64_t stride, int64_t n_rows, int64_t n_columns) {
  for (int64_t r = 0; r < ld; r += W)
    for (int64_t c = 0; c < n_columns; c += W) {
      const int some = static_cast<int>(least(W, n_columns - c));
      vf square[W];
      for (int i = 0; i < W; ++i) {
        if (r + i >= n_rows) {
          square[i] = zero();
          continue;
        }
        const T* at = from + (r + i) * stride + c;
        square[i] = some == W ? load(at) : load_n(at, some);
      }
      transpose(square);
      for (int i = 0; i < some; ++i) store(to + (c + i) * ld + r, square[i]);
    }
}

// 32-bit transpose: to[c][r] = from[r][c]; rows and cols are multiples of W.
inline void transpose_words(float* to, int64_t ld_to, const float* from, int64_t ld_from, int rows,
                            int cols) {
  for (int r = 0; r < rows; r += W)
    for (int c = 0; c < cols; c += W) {
      vf block[W];
      for (int i = 0; i < W; ++i) block[i] = load(from + (r + i) * ld_from + c);
      transpose(block);
      for (int i = 0; i < W; ++i) store(to + (c + i) * ld_to + r, block[i]);
    }
}

// Lane packing of a transpose: rows[n][k] -> B[k / depth][n][depth] with B[k][n] = rows[n][k].
// n_rows and k_words are multiples of W, where k_words counts 32-bit words of a row.
template <class C>
inline void pack_lanes_transposed(C* b, const C* rows, int64_t row_words, int n_rows, int k_words) {
  transpose_words(reinterpret_cast<float*>(b), n_rows, reinterpret_cast<const float*>(rows), row_words,
                  n_rows, k_words);
}

// Lane packing as it stands: rows[k][n] -> B[k / depth][n][depth]; n_rows even, n_cols a multiple of W.
inline void pack_lanes(float* b, const float* rows, int64_t row_stride, int n_rows, int n_cols) {
  for (int k = 0; k < n_rows; ++k)
    for (int n = 0; n < n_cols; n += W)
      store(b + static_cast<int64_t>(k) * n_cols + n, load(rows + k * row_stride + n));
}
inline void pack_lanes(bf16* b, const bf16* rows, int64_t row_stride, int n_rows, int n_cols) {
  for (int k = 0; k < n_rows; k += 2)
    for (int n = 0; n < n_cols; n += W)
      store_pairs(b + static_cast<int64_t>(k) * n_cols + 2 * n, load(rows + k * row_stride + n),
                  load(rows + (k + 1) * row_stride + n));
}

}  // namespace
}  // namespace tw
