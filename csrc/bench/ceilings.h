// What the processor can do at most: loops that only multiply and add in registers, or only read memory.
#pragma once

#include <stdint.h>

namespace tw {

// Each runs `rounds` rounds of independent multiply-adds on each of `threads` threads and returns the number
// of operations done (a multiplication and an addition are two), or 0 without such an instruction.
double ceiling_fma(int64_t rounds, int threads);       // float32
double ceiling_bf16_dot(int64_t rounds, int threads);  // pairs of bfloat16 into float32
double ceiling_int8_dot(int64_t rounds, int threads);  // fours of int8 into int32

// Sums n floats, each thread its own part as `streams` (1, 2, 4 or 8) parts side by side: how many streams of
// reads a processor likes best differs. Returns the sum; false in `known` if streams is none of those.
double ceiling_read(const float* data, int64_t n, int streams, int threads, bool* known);

#define TW_CEILING_KERNELS(level)                                                                    \
  namespace level {                                                                                  \
  double ceiling_fma(int64_t rounds, int threads);                                                   \
  double ceiling_bf16_dot(int64_t rounds, int threads);                                              \
  double ceiling_int8_dot(int64_t rounds, int threads);                                              \
  double ceiling_read(const float* data, int64_t n, int streams, int threads, bool* known);          \
  }
TW_CEILING_KERNELS(portable)
TW_CEILING_KERNELS(avx2)
TW_CEILING_KERNELS(avx512)
TW_CEILING_KERNELS(avx512_bf16)
TW_CEILING_KERNELS(amx)
#undef TW_CEILING_KERNELS

}  // namespace tw
