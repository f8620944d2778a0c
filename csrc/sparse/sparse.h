// The contract of the sparse kernels: pointers, extents and strides.
//
// Axes: T tokens, I in, O out.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace tw {

// An entry of dy^T x.
struct LargeEntry {
  float size;  // its magnitude
  int32_t row, column;
};

// The k entries of dy^T x (O, I) of the largest magnitude; of equal ones those that come first, row by row.
struct LargestCall {
  DType dtype;  // of dy and x
  int64_t tokens, in_features, out_features;
  const void* dy;  // (T, O)
  int64_t dy_row;  // from one row to the next, in elements
  const void* x;   // (T, I)
  int64_t x_row;
  int64_t k;
  int64_t* places;  // (k): o I + i, ascending
  int64_t* found;   // k, or less where the others are NaN
  int threads;
};

// Returns false if scratch memory cannot be had.
bool sparse_largest(const LargestCall& call);

// Moves the k largest of n entries to the front, and returns how many are there: at most k. `least_size`
// becomes that of the smallest of them, if there are k.
int64_t keep_largest(LargeEntry* entries, int64_t n, int64_t k, float* least_size);

// Writes the places of entries, ascending.
void write_places(const LargeEntry* entries, int64_t n, int64_t in_features, int64_t* places);

#define TW_SPARSE_KERNELS(level)                \
  namespace level {                             \
  bool sparse_largest(const LargestCall& call); \
  }
TW_SPARSE_KERNELS(portable)
TW_SPARSE_KERNELS(avx2)
TW_SPARSE_KERNELS(avx512)
TW_SPARSE_KERNELS(avx512_bf16)
TW_SPARSE_KERNELS(amx)
#undef TW_SPARSE_KERNELS

}  // namespace tw
