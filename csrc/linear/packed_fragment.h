// Which elements of a packed weight a lane holds, and how codes become bfloat16: what the Hopper kernel does
// between shared memory and wgmma. It compiles for the host as well, where the tests walk through all lanes.
//
// A block has 128 output rows and steps through 64 inputs: codes[row block 0..7][line 0..7][64 bytes], as
// kernels/common/packed.py draws them. Warp w has row block w. wgmma's rows g and g + 8 of a warp are made
// output rows 2 g and 2 g + 1, so that a lane reads its two words at once and stores neighbours:
//
//   lane L, g = L / 4, j = L % 4:   word of line b, row 2 g      at 64 b + 8 g
//                                   word of line b, row 2 g + 1  at 64 b + 8 g + 4
//   of each word, inputs 8 b + 2 j and 8 b + 2 j + 1: nibbles j and j + 4
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

#include "linear/linear_hopper.h"

namespace tw::packed {

constexpr int kLineBytes = 64;
constexpr int kLineRows = 16;
constexpr int kLineInputs = 8;
constexpr int kLines = kPackedInputs / kLineInputs;      // of a step
constexpr int kRowBlocks = kPackedRows / kLineRows;      // of a block
constexpr int kRowBlockBytes = kLines * kLineBytes;      // codes of a warp's step
constexpr int kCodeBytes = kRowBlocks * kRowBlockBytes;  // of a step
constexpr int kFragment = 4 * kPackedInputs / 16;        // registers of a lane's weights of a step

// A place in a warp's tile: its 16 output rows, and inputs or tokens along the columns.
struct Place {
  int row, column;
};

// Register i of a lane's weights holds this place in its low half and the next column in its high half.
__host__ __device__ constexpr Place fragment_place(int lane, int i) {
  return {2 * (lane / 4) + i % 2, 16 * (i / 4) + 8 * (i / 2 % 2) + 2 * (lane % 4)};
}

// Accumulator i of a lane.
__host__ __device__ constexpr Place sum_place(int lane, int i) {
  return {2 * (lane / 4) + i / 2 % 2, 8 * (i / 4) + 2 * (lane % 4) + i % 2};
}

// Groups of inputs that a step may touch; a step of 64 inputs starts anywhere in a group of 8 u inputs.
__host__ __device__ constexpr int64_t groups_of_a_step(int64_t group_size, int64_t groups) {
  if (groups == 1 || group_size % kPackedInputs == 0) return 1;
  const int64_t most = kPackedInputs % group_size == 0
                           ? kPackedInputs / group_size
                           : (kPackedInputs - 1 + group_size - kLineInputs) / group_size + 1;
  return most < groups ? most : groups;
}

template <class To, class From>
__host__ __device__ __forceinline__ To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits");
  To to;
  memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof(to));
  return to;
}

// Elements i and i + 1, i even.
__host__ __device__ __forceinline__ float2 load_two(const void* data, Real type, int64_t i) {
  if (type == Real::f32) return static_cast<const float2*>(data)[i / 2];
  const uint32_t word = static_cast<const uint32_t*>(data)[i / 2];
  if (type == Real::bf16) return {bits<float>(word << 16), bits<float>(word & 0xffff0000)};
  return __half22float2(bits<__half2>(word));
}

__host__ __device__ __forceinline__ float load_one(const void* data, Real type, int64_t i) {
  if (type == Real::f32) return static_cast<const float*>(data)[i];
  const uint16_t word = static_cast<const uint16_t*>(data)[i];
  if (type == Real::bf16) return bits<float>(uint32_t{word} << 16);
  return __half2float(bits<__half>(word));
}

// The table in shared memory has each entry once for every lane, 128 bytes in all, so that lookups never
// meet in a bank. With sums an entry is a pair of codes, low nibble first, in bfloat16; otherwise it is one
// code in float32.
__host__ __device__ constexpr int table_entries(bool sums) { return sums ? 256 : 16; }
constexpr int kEntryBytes = 128;

__host__ __device__ __forceinline__ uint32_t table_entry(const float* values, bool sums, int i) {
  if (!sums) return bits<uint32_t>(values[i]);
  return bits<uint32_t>(__floats2bfloat162_rn(values[i % 16], values[i / 16]));
}

// A pair of 128 in bfloat16, whose last place is 1: or-ing a code adds it. The kernel gets it as an argument,
// since an instruction that ands and ors takes only one constant.
constexpr uint32_t kBasePair = 0x43004300;

// Decodes the two codes of a word that a lane needs.
//
// TABLE  any sixteen values, looked up; otherwise whole numbers that count up, by arithmetic
// SUMS   the pair is value(code), scaled later; otherwise it is value(code) scale + offset in float32,
//        rounded once: the weight in bfloat16, as it would be decoded beforehand
template <bool TABLE, bool SUMS>
struct Decoder {
  const uint8_t* table;
  uint32_t base;        // kBasePair
  uint32_t zero;        // bfloat16 pair of 128 - values[0]
  uint32_t lane_bytes;  // of an entry
  uint32_t right;       // puts nibble j at bit 0
  uint32_t left;        // rotation that puts nibble j at bit 7: times 128

  __host__ __device__ Decoder(const void* table_, uint32_t base_pair, float first_value, int lane)
      : table(static_cast<const uint8_t*>(table_)),
        base(base_pair),
        zero(bits<uint32_t>(__floats2bfloat162_rn(128.0f - first_value, 128.0f - first_value))),
        lane_bytes(4 * lane),
        right(4 * (lane % 4)),
        left((7 + 32 - 4 * (lane % 4)) % 32) {}

  __host__ __device__ __forceinline__ uint32_t whole_pair(uint32_t word) const {
    const uint32_t shifted = (word >> right & 0x000f000f) | base;
    return bits<uint32_t>(__hsub2(bits<__nv_bfloat162>(shifted), bits<__nv_bfloat162>(zero)));
  }

  // nibble j comes to bits 7-10, nibble j + 4 to bits 23-26
  __host__ __device__ __forceinline__ uint32_t rotated(uint32_t word) const {
    return word << left | word >> (32 - left);
  }

  __host__ __device__ __forceinline__ uint32_t pair(uint32_t word) const {
    static_assert(SUMS, "without sums a pair has a scale");
    if constexpr (!TABLE) return whole_pair(word);
    const uint32_t r = rotated(word);
    const uint32_t at = (r & 0x0780) | (r >> 12 & 0x7800) | lane_bytes;
    return *reinterpret_cast<const uint32_t*>(table + at);
  }

  __host__ __device__ __forceinline__ uint32_t pair(uint32_t word, float scale, float offset) const {
    static_assert(!SUMS, "with sums the scale comes later");
    float low, high;
    if constexpr (TABLE) {
      const uint32_t r = rotated(word);
      low = *reinterpret_cast<const float*>(table + ((r & 0x0780) | lane_bytes));
      high = *reinterpret_cast<const float*>(table + ((r >> 16 & 0x0780) | lane_bytes));
    } else {
      const uint32_t whole = whole_pair(word);
      low = bits<float>(whole << 16);
      high = bits<float>(whole & 0xffff0000);
    }
    return bits<uint32_t>(__floats2bfloat162_rn(fmaf(low, scale, offset), fmaf(high, scale, offset)));
  }
};

// Scales or offsets of a warp's 16 rows in shared memory: (groups of a step, 16).
struct GroupBox {
  const void* data;  // nullptr: none, for offsets
  Real type;
};

// Of a lane's two rows.
__host__ __device__ __forceinline__ float2 load_group(const GroupBox& box, int group, int lane) {
  return load_two(box.data, box.type, group * kLineRows + 2 * (lane / 4));
}

// A lane's weights of one step, from the codes of its warp's row block. With sums `scale` becomes the scales
// of its two rows, which hold for the whole step.
//
// box_groups   groups that a step may touch
// line         of the step's first input, counted in lines from the start of its group
// group_lines  lines of a group
template <bool TABLE, bool SUMS>
__host__ __device__ __forceinline__ void decode_step(uint32_t (&a)[kFragment], float2& scale,
                                                     const uint8_t* codes, const GroupBox& scales,
                                                     const GroupBox& offsets, int box_groups, int line,
                                                     int group_lines, const Decoder<TABLE, SUMS>& decoder,
                                                     int lane) {
  uint2 words[kLines];
#pragma unroll
  for (int b = 0; b < kLines; ++b)
    words[b] = *reinterpret_cast<const uint2*>(codes + b * kLineBytes + lane / 4 * 8);

  scale = load_group(scales, 0, lane);
  if constexpr (SUMS) {
#pragma unroll
    for (int b = 0; b < kLines; ++b) {
      a[2 * b] = decoder.pair(words[b].x);
      a[2 * b + 1] = decoder.pair(words[b].y);
    }
  } else {
    const bool has_offsets = offsets.data != nullptr;
    float2 offset{};
    if (has_offsets) offset = load_group(offsets, 0, lane);
    const auto decode_line = [&](int b) {
      a[2 * b] = decoder.pair(words[b].x, scale.x, offset.x);
      a[2 * b + 1] = decoder.pair(words[b].y, scale.y, offset.y);
    };
    if (box_groups == 1) {  // the usual case, free of branches
#pragma unroll
      for (int b = 0; b < kLines; ++b) decode_line(b);
      return;
    }
    int group = 0;
#pragma unroll
    for (int b = 0; b < kLines; ++b, ++line) {
      if (line == group_lines) {
        line = 0;
        scale = load_group(scales, ++group, lane);
        if (has_offsets) offset = load_group(offsets, group, lane);
      }
      decode_line(b);
    }
  }
}

}  // namespace tw::packed
