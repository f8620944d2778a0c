// The contract of the experts' MLPs: pointers, extents and strides. See kernels/moe/README.md for the
// equations.
//
// Axes: T tokens, K slots of a token, E experts, H features, I width of an expert. A slot that goes to an
// expert is a row; rows stand expert by expert.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/packed_weight.h"
#include "common/rows.h"

namespace tw {

enum class Gate : int { swiglu, geglu, geglu_tanh, clamped_swiglu, reglu };

// How the outputs of `up` hold gates and ups; `alone`: there are no ups, which then count as 1.
enum class Layout : int { halves, alternating, alone };

// One weight of all experts.
struct ExpertWeight {
  Rows rows;            // of the first expert; data is nullptr where `packed` holds
  int64_t expert;       // stride between experts, elements
  PackedWeight packed;  // all experts one below the other
};

struct MoeCall {
  DType dtype;  // of x, y, z and dense weights
  int64_t tokens, slots, experts, features, width;
  Gate gate;
  float alpha, limit;      // of clamped_swiglu
  Layout layout;           // of the lines of `up`, z and what goes with it
  bool transposed;         // weights are (in, out)
  bool scale_input;        // gates multiply the input instead of the output
  Rows x, y;               // (T, H)
  const float* gates;      // (T, K)
  const int32_t* order;    // (T K): the slot of each row, those that go nowhere last
  const int64_t* starts;   // (E + 1): each expert's first row
  ExpertWeight up, down;   // (E, lines, H), (E, H, I); lines is 2 I, or I of gates alone
  const float* up_bias;    // (E, lines), or nullptr
  const float* down_bias;  // (E, H), or nullptr
  const void* z_update;    // (rows, lines), added before the activation, or nullptr
  void* z;                 // (rows, lines): what the activation is applied to; nullptr where not kept
  int threads;
};

inline int64_t lines_of(const MoeCall& call) {
  return call.layout == Layout::alone ? call.width : 2 * call.width;
}

// Gradients; each pointer is nullptr where its gradient is not wanted.
struct MoeBackwardCall {
  MoeCall forward;        // y is not read, z is
  Rows dy;                // (T, H)
  const void* da_update;  // (rows, I), added to W2^T dy, or nullptr
  void* dz;               // (rows, lines): the gradient of z
  Rows dx;                // (T, H)
  float* dgates;          // (T, K)
  void *dup, *ddown;      // contiguous, in the shape of the weights
  float *dup_bias, *ddown_bias;
};

// Where the rows of experts come from: row r is row index[r] of a tensor, or row r without an index.
struct IndexedRows {
  Rows rows;
  const int32_t* index;
};

// to[r] = weight[e] from[r] for the rows r of each expert e.
struct GroupedCall {
  DType dtype;
  int64_t experts, n_out, n_in;
  const int64_t* starts;  // (E + 1)
  IndexedRows from;       // of n_in
  Rows weight;            // of the first expert: (n_out, n_in), or (n_in, n_out) if transposed
  int64_t weight_expert;  // stride between experts, elements
  bool transposed;
  Rows to;
  int threads;
};

// to[e] = the sum of left[r]^T right[r] over the rows r of expert e.
struct OuterCall {
  DType dtype;
  int64_t experts, n_left, n_right;
  const int64_t* starts;
  IndexedRows left, right;
  void* to;  // (E, n_left, n_right), contiguous
  int threads;
};

// Each returns false if scratch memory cannot be had.
bool moe_forward(const MoeCall& call);
bool moe_backward(const MoeBackwardCall& call);
bool moe_grouped(const GroupedCall& call);
bool moe_outer(const OuterCall& call);

// moe_rows is for experts with a few rows each.
#define TW_MOE_KERNELS(level)                     \
  namespace level {                               \
  bool moe_forward(const MoeCall& call);          \
  bool moe_rows(const MoeCall& call);             \
  bool moe_backward(const MoeBackwardCall& call); \
  bool moe_grouped(const GroupedCall& call);      \
  bool moe_outer(const OuterCall& call);          \
  }
TW_MOE_KERNELS(portable)
TW_MOE_KERNELS(avx2)
TW_MOE_KERNELS(avx512)
TW_MOE_KERNELS(avx512_bf16)
TW_MOE_KERNELS(amx)
#undef TW_MOE_KERNELS

}  // namespace tw
