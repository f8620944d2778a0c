// How wgmma finds a tile in shared memory: apart from sm90.cuh because the host can compile it.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace tw::sm90 {

// The descriptor of a B tile (N rows of 64 two-byte inputs, 128 bytes a row) at a shared address, as a box
// with the 128-byte swizzle leaves it: chunk c (16 bytes) of row r lies at chunk c ^ (r % 8), eight rows are
// 1024 bytes.
//   bits 0-13 address / 16, 16-29 unused with a swizzle (1), 32-45 bytes between groups of eight rows / 16,
//   49-51 0 for tiles at multiples of 1024, 62-63 1 for the 128-byte swizzle
// 16 inputs further on is 32 bytes, so 2 more in the address field; the swizzle follows the address bits.
__host__ __device__ constexpr uint64_t swizzled_tile(uint32_t address) {
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
constexpr uint64_t kNext16Inputs = 32 >> 4;

}  // namespace tw::sm90
