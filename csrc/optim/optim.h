// The contract of the optimizers' kernels: all tensors of a call in one pass over memory.
//
// Work is dealt out in chunks of kChunk entries of one tensor, so that sums over chunks, taken in order, do
// not depend on the number of threads.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace tw {

constexpr int64_t kChunk = 16384;
constexpr int64_t kStateBlock = 256;  // entries of a state in 8 bits that share a scale; kChunk is a multiple

// How a parameter of 16 bits takes what was computed in float.
enum class Narrow : int {
  nearest,
  stochastic,  // bf16 alone: up or down with the probability that makes the mean right
};

// m and v of one tensor: floats, or codes with a scale for each kStateBlock entries.
struct AdamwState {
  float *mean, *square;
  uint8_t *mean_codes, *square_codes;  // null: floats
  float *mean_scales, *square_scales;
};

struct AdamwItem {
  int64_t n;             // entries that train
  void* parameter;       // contiguous, of the call's dtype
  const void* gradient;  // as the parameter
  AdamwState state;      // (n)
  float* master;         // (n) or null: what `parameter` is the rounding of
  int32_t* ages;         // (n) or null: steps that each entry has made
  float* step;           // or null: steps that all of them have made
  const void* places;    // (n) distinct places in parameter and gradient, or null: all of them
  uint32_t key;          // of its random numbers, together with an entry's number and age
};

// m += (1 - beta1) (g - m)      v = beta2 v + (1 - beta2) g^2      age += 1      with g = scale gradient
// p = p (1 - lr decay) - lr / (1 - beta1^age) m / (sqrt(v) / sqrt(1 - beta2^age) + eps)
struct AdamwCall {
  DType dtype;
  bool has_wide_gradient;  // float beside a parameter of 16 bits
  bool has_wide_places;    // int64, else int32
  Narrow narrow;
  int64_t n_items;
  const AdamwItem* items;
  double lr, beta1, beta2, eps, weight_decay;
  float scale;
  int threads;
};
bool adamw(const AdamwCall& call);  // false: no memory for scratch

// What adamw() works out first.
struct AdamwPlan {
  const int64_t* first_chunks;  // (n_items + 1): the number of each item's first chunk
  const float* corrections;     // (n_items, 2): lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step)
  const float* by_age;          // (n_ages, 2): the same with 1 for lr for each age, or null
  int64_t n_ages;
  bool is_settled;  // from n_ages on the corrections are those of n_ages - 1
};

struct Gradient {
  const void* data;
  int64_t n;
};
struct SquaresCall {
  DType dtype;
  int64_t n_items;
  const Gradient* items;
  int threads;
};
// The sum of the squares of all elements; false: no memory for scratch.
bool sum_of_squares(const SquaresCall& call, double* sum);

// s = min(row, column) + g^2, row and column are the largest s so far      p = p (1 - lr decay) - lr g /
// sqrt(s + eps)
//
// over all cells of a matrix, or those that row_offsets and columns name; there parameter and gradient hold
// either all cells or, compact, the named ones.
struct Sm3Call {
  DType dtype;
  bool has_wide_gradient;
  int64_t n_rows, n_columns;
  void* parameter;
  const void* gradient;
  float *row, *column;
  const int64_t* row_offsets;  // (n_rows + 1), or null: all cells
  const void* columns;         // int32, or uint16 where has_short_columns
  bool has_short_columns;
  bool is_compact;
  double lr, eps, weight_decay;
  float scale;
  int threads;
};
bool sm3(const Sm3Call& call);  // false: no memory for scratch

#define TW_OPTIM_KERNELS(level)                                                                           \
  namespace level {                                                                                       \
  void adamw(const AdamwCall& call, const AdamwPlan& plan);                                               \
  void sm3(const Sm3Call& call, float* largest); /* (threads, n_columns) */                               \
  void sum_of_squares(const SquaresCall& call, const int64_t* first_chunks, double* sums); /* by chunk */ \
  }
TW_OPTIM_KERNELS(portable)
TW_OPTIM_KERNELS(avx2)
TW_OPTIM_KERNELS(avx512)
TW_OPTIM_KERNELS(avx512_bf16)
TW_OPTIM_KERNELS(amx)
#undef TW_OPTIM_KERNELS

}  // namespace tw
