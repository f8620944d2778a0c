// The contract of the linear kernels: pointers, extents and strides. See kernels/linear/README.md for the
// equations.
//
// Axes: T tokens, I in, O out, R rank of the low-rank update.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/packed_weight.h"
#include "common/rows.h"

namespace tw {

// A sparse D (O, I) by rows: columns[n] and values[n] for offsets[o] <= n < offsets[o + 1].
struct SparseDelta {
  const int64_t* offsets;  // (O + 1), or nullptr where there is no D
  const void* columns;     // uint16_t if short_columns, else int32_t; ascending in a row
  const void* values;      // bf16 if short_values, else float
  bool short_columns, short_values;
};

struct LinearCall {
  DType dtype;  // of x, y, weight, down, up and hidden
  int64_t tokens, in_features, out_features;
  int rank;     // 0: no low-rank update
  Rows x, y;    // (T, I), (T, O)
  Rows weight;  // (O, I); data is nullptr where `packed` holds
  PackedWeight packed;
  const float* bias;       // (O), or nullptr
  const float* out_scale;  // (O), or nullptr
  Rows down, up;           // (R, I), (O, R)
  Rows hidden;             // (T, R): f(down drop(x)), written by the forward, read by the backward
  float scale;
  bool relu;                       // f
  const int32_t* row_adapters;     // (T), or nullptr: all rows have all of the rank
  const int32_t* column_adapters;  // (R)
  const float* column_scales;      // (R), or nullptr; instead of scale
  float dropout_p;
  uint64_t dropout_seed;
  // the base product reads x rounded to 8 bits; of an int8 weight or a table of multiples of one number
  bool int8_activations;
  const int32_t* input_order;  // (I): which input of the numbering of D and of the dropout each column is, or
                               // nullptr
  SparseDelta delta;           // added to the weight
  int n_deltas;                // 0, or one below the other in `delta`: rows of x have that of their adapter
  Rows delta_x;                // (T, I): x in the order of D's columns
  const float* delta_sums;     // (T, O): the sums of D x where they are made ahead, or nullptr
  int threads;
};

// Gradients; each pointer is nullptr where its gradient is not wanted.
struct LinearBackwardCall {
  LinearCall forward;  // y is not read
  Rows dy;             // (T, O)
  Rows dx;             // (T, I)
  float* dbias;        // (O)
  float* ddown;        // (R, I)
  float* dup;          // (R, O): the transpose of the gradient of up
};

// products[n] = sum_t dy[t][o] x[t][i] for each place n = (o, i) of a sparse matrix.
struct SampledCall {
  DType dtype;  // of dy and x
  int64_t tokens, in_features, out_features;
  Rows dy, x;
  SparseDelta at;  // its values are not read
  float* products;
  int threads;
};

// Several calls are layers over the same x, of one dtype and number of threads. Forward, x is packed once for
// those that fit together; backward all have to, and their dx is one sum, written where the first says.
constexpr int kMostLayers = 8;
bool linear_fit_together(const LinearCall* calls, int n_calls);

// Each returns false if scratch memory cannot be had.
bool linear_forward(const LinearCall* calls, int n_calls);
bool linear_backward(const LinearBackwardCall* calls, int n_calls);
bool linear_sampled(const SampledCall& call);

// linear_rows and linear_byte_rows are for a few tokens and no dropout, the latter for levels with a dot
// product of bytes and for packed weights but e4m3, of bf16 x or with int8_activations. linear_int8 says
// whether the call is one for it, and does nothing if not. linear_delta makes the sums of D x of a few
// tokens. Several layers are all dense or all packed with codes of one kind, and know no input_order.
#define TW_LINEAR_KERNELS(level)                                      \
  namespace level {                                                   \
  bool linear_forward(const LinearCall* calls, int n_calls);          \
  bool linear_rows(const LinearCall& call);                           \
  bool linear_byte_rows(const LinearCall& call);                      \
  bool linear_int8(const LinearCall& call, bool* fits);               \
  bool linear_backward(const LinearBackwardCall* calls, int n_calls); \
  bool linear_delta(const LinearCall& call, float* sums);             \
  bool linear_sampled(const SampledCall& call);                       \
  }
TW_LINEAR_KERNELS(portable)
TW_LINEAR_KERNELS(avx2)
TW_LINEAR_KERNELS(avx512)
TW_LINEAR_KERNELS(avx512_bf16)
TW_LINEAR_KERNELS(amx)
#undef TW_LINEAR_KERNELS

}  // namespace tw
