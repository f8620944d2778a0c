// The contract of the quant kernels; kernels/common/packed.py draws the layout of packed weights.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/packed_weight.h"

namespace tw {

// W (O, I) of a packed weight, in the order of its columns.
struct DecodeWeightCall {
  DType dtype;  // of what is written
  PackedWeight weight;
  int64_t out_features, in_features;
  void* to;     // rows of contiguous elements
  int64_t row;  // from one row to the next, in elements
  int threads;
};

void decode_weight(const DecodeWeightCall& call);

#define TW_QUANT_KERNELS(level)                     \
  namespace level {                                 \
  void decode_weight(const DecodeWeightCall& call); \
  }
TW_QUANT_KERNELS(portable)
TW_QUANT_KERNELS(avx2)
TW_QUANT_KERNELS(avx512)
TW_QUANT_KERNELS(avx512_bf16)
TW_QUANT_KERNELS(amx)
#undef TW_QUANT_KERNELS

}  // namespace tw
