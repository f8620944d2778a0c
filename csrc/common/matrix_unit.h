// The processor's matrix unit (AMX), where the level has one: 16 x 16 float sums from pairs of bf16.
//
// Its tiles are 16 rows of 64 bytes and lie in memory as gemm_tile.h packs them anyway:
//   A   16 rows of 16 pairs      row-major
//   B   16 pairs of 16 lanes     B[k / 2][n][2]
//   C   16 rows of 16 floats     row-major
#pragma once

#include "common/vec.h"

namespace tw {
namespace {

constexpr int kUnitTile = 16;  // rows, lanes and pairs of a tile
constexpr double kUnitRoundOperations = 4 * 2.0 * 2 * kUnitTile * kUnitTile * kUnitTile;  // of bf16

// c[m][n] (+)= sum_k a[m][k] b[k][n] for ROWS x LANES tiles (1 or 2 each), of bf16 into float or of signed
// bytes into int32. depth counts words of k, pairs or fours, a multiple of kUnitTile; lda counts elements,
// ldb lanes, ldc sums. Only where kHasMatrixUnit.
template <int ROWS, int LANES, bool ADDS, class T, class S>
void unit_product(int depth, const T* a, int64_t lda, const T* b, int64_t ldb, S* c, int64_t ldc);

#if defined(TW_ISA_amx)

// What ldtilecfg reads: eight tiles of 16 rows of 64 bytes.
struct alignas(64) UnitShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// a constant, because gcc 12 takes ldtilecfg for one that reads eight bytes and may drop stores to the rest
constexpr UnitShapes kUnitShapes;

// While one lives, the tile registers of this thread can be used.
class MatrixUnit {
 public:
  MatrixUnit() { _tile_loadconfig(&kUnitShapes); }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// Two by two tiles of sums take four loads for four products, each twice as long as a load.
template <int ROWS, int LANES, bool ADDS, class T, class S>
[[gnu::always_inline]] inline void unit_product(int depth, const T* a, int64_t lda, const T* b, int64_t ldb,
                                                S* c, int64_t ldc) {
  constexpr bool kBytes = sizeof(T) == 1;
  constexpr int kWord = 4 / sizeof(T);  // elements
  const int64_t a_bytes = lda * static_cast<int64_t>(sizeof(T)), b_bytes = ldb * 4, c_bytes = ldc * 4;
  __asm__ volatile("" ::: "memory");  // gcc 12 takes a tile load for one that reads no memory
  if constexpr (ADDS) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (LANES == 2) _tile_loadd(1, c + kUnitTile, c_bytes);
    if constexpr (ROWS == 2) _tile_loadd(2, c + kUnitTile * ldc, c_bytes);
    if constexpr (ROWS == 2 && LANES == 2) _tile_loadd(3, c + kUnitTile * ldc + kUnitTile, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (LANES == 2) _tile_zero(1);
    if constexpr (ROWS == 2) _tile_zero(2);
    if constexpr (ROWS == 2 && LANES == 2) _tile_zero(3);
  }
  for (int k = 0; k < depth; k += kUnitTile) {
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(4, a, a_bytes);
    if constexpr (LANES == 2) _tile_loadd(7, b + kWord * kUnitTile, b_bytes);
    if constexpr (ROWS == 2) _tile_loadd(5, a + kUnitTile * lda, a_bytes);
    if constexpr (kBytes) {
      _tile_dpbssd(0, 4, 6);
      if constexpr (LANES == 2) _tile_dpbssd(1, 4, 7);
      if constexpr (ROWS == 2) _tile_dpbssd(2, 5, 6);
      if constexpr (ROWS == 2 && LANES == 2) _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (LANES == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (ROWS == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (ROWS == 2 && LANES == 2) _tile_dpbf16ps(3, 5, 7);
    }
    a += kWord * kUnitTile;
    b += kUnitTile * ldb * kWord;
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (LANES == 2) _tile_stored(1, c + kUnitTile, c_bytes);
  if constexpr (ROWS == 2) _tile_stored(2, c + kUnitTile * ldc, c_bytes);
  if constexpr (ROWS == 2 && LANES == 2) _tile_stored(3, c + kUnitTile * ldc + kUnitTile, c_bytes);
  __asm__ volatile("" ::: "memory");
}

// For measuring: `rounds` rounds of four independent products of tiles in registers, of bf16 or int8.
template <class T>
inline float unit_rounds(int64_t rounds) {
  alignas(64) float sums[kUnitTile * kUnitTile];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t round = 0; round < rounds; ++round) {
    if constexpr (sizeof(T) == 2) {
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 5);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 5);
    } else {
      _tile_dpbssd(0, 4, 5);
      _tile_dpbssd(1, 4, 5);
      _tile_dpbssd(2, 4, 5);
      _tile_dpbssd(3, 4, 5);
    }
  }
  _tile_stored(0, sums, kUnitTile * 4);
  return sums[0];
}

#else

template <class T>
float unit_rounds(int64_t rounds);

// Nothing to prepare: products are vector instructions.
struct MatrixUnit {
  MatrixUnit() {}
};

#endif

}  // namespace
}  // namespace tw
