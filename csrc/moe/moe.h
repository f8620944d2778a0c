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

enum class Gate : int { swiglu, geglu, geglu_tanh, clamped_swiglu };

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
  bool interleaved;        // outputs of `up` alternate between gate and up, else gates come first
  bool transposed;         // weights are (in, out)
  bool scale_input;        // gates multiply the input instead of the output
  Rows x, y;               // (T, H)
  const float* gates;      // (T, K)
  const int32_t* order;    // (T K): the slot of each row, those that go nowhere last
  const int64_t* starts;   // (E + 1): each expert's first row
  ExpertWeight up, down;   // (E, 2 I, H), (E, H, I)
  const float* up_bias;    // (E, 2 I), or nullptr
  const float* down_bias;  // (E, H), or nullptr
  const void* z_update;    // (rows, 2 I), added before the activation, or nullptr
  void* z;                 // (rows, 2 I): what the activation is applied to; nullptr where not kept
  int threads;
};

// Gradients; each pointer is nullptr where its gradient is not wanted.
struct MoeBackwardCall {
  MoeCall forward;        // y is not read, z is
  Rows dy;                // (T, H)
  const void* da_update;  // (rows, I), added to W2^T dy, or nullptr
  void* dz;               // (rows, 2 I): the gradient of z
  Rows dx;                // (T, H)
  float* dgates;          // (T, K)
  void *dup, *ddown;      // contiguous, in the shape of the weights
  float *dup_bias, *ddown_bias;
};

// Each returns false if scratch memory cannot be had.
bool moe_forward(const MoeCall& call);
bool moe_backward(const MoeBackwardCall& call);

// moe_rows is for experts with a few rows each.
#define TW_MOE_KERNELS(level)                     \
  namespace level {                               \
  bool moe_forward(const MoeCall& call);          \
  bool moe_rows(const MoeCall& call);             \
  bool moe_backward(const MoeBackwardCall& call); \
  }
TW_MOE_KERNELS(portable)
TW_MOE_KERNELS(avx2)
TW_MOE_KERNELS(avx512)
TW_MOE_KERNELS(avx512_bf16)
TW_MOE_KERNELS(amx)
#undef TW_MOE_KERNELS

}  // namespace tw
