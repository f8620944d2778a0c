// A quantized weight as kernels see it; kernels/common/packed.py draws the layout.
#pragma once

#include <stdint.h>

namespace tw {

constexpr int kLineRows = 16;   // output rows of a line of codes
constexpr int kLineBytes = 64;  // four bytes for each
constexpr int kTableCodes = 16;

// How a code becomes a number: by a table of 16 (4-bit codes), or as a type of 8 bits.
enum class Codes : int { table, int8, e4m3 };
enum class ScaleType : int { f32, f16, bf16, nested };

struct PackedWeight {
  Codes kind;
  float table[kTableCodes];
  const uint8_t* codes;  // (row blocks, lines, 64)
  int64_t lines;
  ScaleType scale_type;
  const void* scales;   // (row blocks, groups, 16)
  const void* offsets;  // the same, or nullptr
  int64_t groups;
  int64_t group_size;  // inputs that share a scale; a multiple of a line's inputs unless groups is 1
  // nested: scale = nested_table[code] * nested_absmax[(row * groups + group) / nested_block] + nested_offset
  const float* nested_table;
  const float* nested_absmax;
  int64_t nested_block, nested_count;  // nested_count: entries of nested_absmax
  float nested_offset;
};

namespace {

constexpr int line_inputs(Codes kind) { return kind == Codes::table ? 8 : 4; }

}  // namespace

}  // namespace tw
