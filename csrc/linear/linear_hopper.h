// The contract of the Hopper kernel over 4-bit packed weights: pointers, extents and strides.
// kernels/common/packed.py draws the layout of codes and scales.
#pragma once

#include <stdint.h>

namespace tw {

enum class Real : int { f32, bf16, f16 };

struct RealArray {
  const void* data;  // nullptr: none
  Real type;
};

// y (T, O) = (x W^T + bias) out_scale + scale hidden up^T, with W[o, i] = value[code] scales + offsets
struct PackedLinear {
  int64_t tokens, in_features, out_features;  // T, I, O
  const void* x;                              // (T, I) bfloat16
  int64_t x_stride;                           // elements between rows, a multiple of 8
  const void* codes;                          // (ceil(O / 16), ceil(I / 8), 64)
  RealArray scales, offsets;                  // (ceil(O / 16), groups, 16)
  int64_t group_size, groups;
  float values[16];  // of the codes
  bool counts;       // values[c] = values[0] + c, whole numbers between -128 and 127
  RealArray bias, out_scale;
  const void* hidden;  // (T, rank) bfloat16
  int64_t hidden_stride;
  const void* up;  // (O, rank) bfloat16, contiguous
  int rank;        // 0 to 64
  float scale;     // not 0 with a rank
  void* y;         // (T, O) bfloat16, contiguous
  float* partial;  // (splits, T, O rounded up to kPackedRows), if there are several splits
  int tile;        // tokens of a block
  bool sums;       // scales meet the sums of their group and not each weight
  int splits;      // blocks that share the inputs of one tile
  int device;
  void* stream;
};

constexpr int kPackedRows = 128;    // output rows of a block
constexpr int kPackedInputs = 64;   // inputs of one step
constexpr int kPackedMaxRank = 64;  // of the low-rank update: one step

// Whether a kernel was compiled for this choice.
bool packed_linear_is_built(bool counts, bool sums, int tile);

// Launches; nullptr, or why it did not.
const char* packed_linear_hopper(const PackedLinear& call);

struct NestedScales {
  const uint8_t* codes;  // (ceil(O / 16), groups, 16)
  const float* table;    // (256)
  const float* absmax;   // (ceil(O groups / block))
  float offset;
  int64_t block, out_features, groups;
  float* scales;  // like codes
  int device;
  void* stream;
};

// scales[o, g] = table[codes[o, g]] absmax[(o groups + g) / block] + offset, 0 beyond O
const char* resolve_nested_scales(const NestedScales& call);

}  // namespace tw
