// A linear layer over 4-bit packed weights on Hopper: y^T = W x^T, tile by tile.
//
// wgmma takes its operand A from registers, B from shared memory. The weights are A: codes are decoded where
// they are multiplied, and never stored as numbers. x is B as it lies in memory, so it passes from the copy
// engine to the tensor cores untouched.
//
// A block has 128 output rows and TOKENS tokens. Warp 8 feeds a ring of stages of 64 inputs; warps 0-3 and
// 4-7 are two warp-groups of 64 rows each, which decode a step while the tensor cores multiply the last one.
#pragma once

#include "common/sm90.cuh"
#include "linear/linear_hopper.h"
#include "linear/packed_fragment.h"

namespace tw::packed {

constexpr int kConsumers = 256;
constexpr int kConsumerWarps = kConsumers / 32;
constexpr int kConsumerBarrier = 1;
constexpr int kFeedingRegisters = 40, kConsumingRegisters = 232;  // 40 + 2 * 232 = 3 * 168
constexpr int kXRowBytes = kPackedInputs * 2;

// TOKENS of a block, and what follows for its shared memory: x, codes, scales, offsets of each stage, the
// table, the barriers. x comes first, since a swizzled box starts at a multiple of 1024.
template <bool TABLE, bool SUMS, int TOKENS>
struct Layout {
  static constexpr int kInstruction = TOKENS < 128 ? TOKENS : 128;  // tokens of one wgmma
  static constexpr int kParts = TOKENS / kInstruction;
  static constexpr int kBlocks = TOKENS <= 32 ? 2 : 1;  // on one multiprocessor
  // Three warps on a quarter of the multiprocessor have 168 registers each. 128 sums and two fragments need
  // more, so there the feeding warp is a whole warp-group, which can give its registers away.
  static constexpr bool kMovesRegisters = TOKENS == 256;
  static constexpr int kThreads = kConsumers + (kMovesRegisters ? 128 : 32);
  static constexpr int kXBytes = TOKENS * kXRowBytes;
  static constexpr int kScaleBytes = kRowBlocks * kLineRows * 4 * (SUMS ? 1 : kLines);
  static constexpr int kOffsetBytes = SUMS ? 0 : kScaleBytes;
  static constexpr int kStageBytes = kXBytes + kCodeBytes + kScaleBytes + kOffsetBytes;
  static constexpr int kTableBytes = TABLE ? table_entries(SUMS) * kEntryBytes : 0;
  static constexpr int kBarrierBytes = 512;
  // a multiprocessor has 228 KiB, of which each block costs one more
  static constexpr int kRoom = (228 / kBlocks - 1) * 1024 - kTableBytes - kBarrierBytes;
  static constexpr int kStages = kRoom / kStageBytes < 12 ? kRoom / kStageBytes : 12;
  static constexpr int kBytes = kStages * kStageBytes + kTableBytes + kBarrierBytes;
  static_assert(kStages >= 3, "one stage is read, one decoded, one filled");
  static_assert(2 * kStages * sizeof(uint64_t) <= kBarrierBytes, "two barriers a stage");
};

struct Arguments {
  CUtensorMap x, codes, scales, offsets, hidden;
  PackedLinear call;
  int steps, split_steps;  // of 64 inputs: in all, and of one split
  uint32_t group_inputs;   // of a group: group_size, or more than there are inputs
  int box_groups, box_bytes, offset_box_bytes;
  uint32_t base_pair;
};

__host__ __device__ constexpr int size_of(Real type) { return type == Real::f32 ? 4 : 2; }

inline CUtensorMapDataType map_type(Real type) {
  switch (type) {
    case Real::f32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case Real::bf16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case Real::f16:
      break;
  }
  return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// The maps of a call whose other arguments are set; nullptr, or why not.
inline const char* make_maps(Arguments& to) {
  const PackedLinear& call = to.call;
  const int64_t row_blocks = (call.out_features + kLineRows - 1) / kLineRows;
  const int64_t lines = (call.in_features + kLineInputs - 1) / kLineInputs;
  const auto activations = [&](CUtensorMap* map, const void* data, int64_t columns, int64_t stride) {
    return sm90::make_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, call.tokens, columns, stride * 2,
                          call.tile, kPackedInputs, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  const auto of_groups = [&](CUtensorMap* map, const RealArray& array) {
    const int64_t columns = call.groups * kLineRows;
    return sm90::make_map(map, map_type(array.type), array.data, row_blocks, columns,
                          columns * size_of(array.type), kRowBlocks, to.box_groups * kLineRows,
                          CU_TENSOR_MAP_SWIZZLE_NONE);
  };
  const char* wrong = activations(&to.x, call.x, call.in_features, call.x_stride);
  if (wrong == nullptr)
    wrong =
        sm90::make_map(&to.codes, CU_TENSOR_MAP_DATA_TYPE_UINT32, call.codes, row_blocks, lines * kLineRows,
                       lines * kLineBytes, kRowBlocks, kLines * kLineRows, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (wrong == nullptr) wrong = of_groups(&to.scales, call.scales);
  if (wrong == nullptr && call.offsets.data != nullptr) wrong = of_groups(&to.offsets, call.offsets);
  if (wrong == nullptr && call.rank > 0)
    wrong = activations(&to.hidden, call.hidden, call.rank, call.hidden_stride);
  return wrong;
}

// Everything a launch needs; nullptr, or why not.
inline const char* prepare(Arguments& to, const PackedLinear& call) {
  to.call = call;
  to.base_pair = kBasePair;
  to.steps = static_cast<int>((call.in_features + kPackedInputs - 1) / kPackedInputs);
  to.split_steps = (to.steps + call.splits - 1) / call.splits;
  to.group_inputs = call.groups == 1 ? uint32_t{1} << 31 : static_cast<uint32_t>(call.group_size);
  to.box_groups = static_cast<int>(groups_of_a_step(call.group_size, call.groups));
  const int box = to.box_groups * kLineRows * kRowBlocks;
  to.box_bytes = box * size_of(call.scales.type);
  to.offset_box_bytes = call.offsets.data == nullptr ? 0 : box * size_of(call.offsets.type);
  return make_maps(to);
}

// The stage of a step, and the parity of its barriers' phase.
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// The low-rank update's `up` in place of decoded weights: rank columns, zeros beyond.
__device__ __forceinline__ void load_up(uint32_t (&a)[kFragment], const PackedLinear& call, int64_t first_row,
                                        int lane) {
  const uint16_t* up = static_cast<const uint16_t*>(call.up);
#pragma unroll
  for (int i = 0; i < kFragment; ++i) {
    const Place place = fragment_place(lane, i);
    const int64_t row = first_row + place.row;
    uint32_t low = 0, high = 0;
    if (row < call.out_features) {
      if (place.column < call.rank) low = up[row * call.rank + place.column];
      if (place.column + 1 < call.rank) high = up[row * call.rank + place.column + 1];
    }
    a[i] = low | high << 16;
  }
}

template <int INSTRUCTION, int PARTS>
__device__ __forceinline__ void multiply(float (&sums)[PARTS][INSTRUCTION / 2],
                                         const uint32_t (&a)[kFragment], uint64_t x, bool adds) {
#pragma unroll
  for (int k = 0; k < kPackedInputs / 16; ++k)
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
      sm90::wgmma(sums[part], a + 4 * k, x + k * sm90::kNext16Inputs + part * (INSTRUCTION * kXRowBytes >> 4),
                  adds || k > 0);
}

template <int INSTRUCTION, int PARTS>
__device__ __forceinline__ void pin(float (&sums)[PARTS][INSTRUCTION / 2]) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part) sm90::pin(sums[part]);
}

template <bool TABLE, bool SUMS, int TOKENS>
__global__ void __launch_bounds__(Layout<TABLE, SUMS, TOKENS>::kThreads, Layout<TABLE, SUMS, TOKENS>::kBlocks)
    packed_linear_kernel(const __grid_constant__ Arguments arguments) {
  using Here = Layout<TABLE, SUMS, TOKENS>;
  constexpr int kStages = Here::kStages;
  const PackedLinear& call = arguments.call;
  extern __shared__ __align__(1024) uint8_t x[];
  uint8_t* const codes = x + kStages * Here::kXBytes;
  uint8_t* const scales = codes + kStages * kCodeBytes;
  uint8_t* const offsets = scales + kStages * Here::kScaleBytes;
  uint8_t* const table = offsets + kStages * Here::kOffsetBytes;
  uint64_t* const filled = reinterpret_cast<uint64_t*>(table + Here::kTableBytes);
  uint64_t* const emptied = filled + kStages;

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = sm90::lane_index();
  const int first_step = blockIdx.z * arguments.split_steps;
  const int count = min(arguments.split_steps, arguments.steps - first_step);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kPackedRows;
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * TOKENS;
  const bool updates = call.rank > 0 && blockIdx.z + 1 == gridDim.z;

  if (threadIdx.x == 0) {
    if (sm90::shared_address(x) % 1024 != 0) __trap();
    for (int s = 0; s < kStages; ++s) {
      sm90::barrier_init(filled + s, 1);
      sm90::barrier_init(emptied + s, kConsumerWarps);
    }
    sm90::barrier_init_fence();
  }
  __syncthreads();

  Ring<kStages> ring;
  if (warp >= kConsumerWarps) {
    if constexpr (Here::kMovesRegisters) sm90::give_registers_back<kFeedingRegisters>();
    if (warp != kConsumerWarps || lane != 0) return;
    const int row_block = blockIdx.x * kRowBlocks, token = static_cast<int>(first_token);
    const int bytes = Here::kXBytes + kCodeBytes + arguments.box_bytes + arguments.offset_box_bytes;
    for (int i = 0; i < count; ++i) {
      const int input = (first_step + i) * kPackedInputs, s = ring.stage;
      const int column = static_cast<int>(static_cast<uint32_t>(input) / arguments.group_inputs) * kLineRows;
      sm90::barrier_wait(emptied + s, ring.parity ^ 1);
      sm90::barrier_arrive_expect(filled + s, bytes);
      sm90::copy_box(codes + s * kCodeBytes, &arguments.codes, input * 2, row_block, filled + s);
      sm90::copy_box(scales + s * Here::kScaleBytes, &arguments.scales, column, row_block, filled + s);
      if (arguments.offset_box_bytes > 0)
        sm90::copy_box(offsets + s * Here::kOffsetBytes, &arguments.offsets, column, row_block, filled + s);
      sm90::copy_box(x + s * Here::kXBytes, &arguments.x, input, token, filled + s);
      ring.advance();
    }
    if (updates) {
      sm90::barrier_wait(emptied + ring.stage, ring.parity ^ 1);
      sm90::barrier_arrive_expect(filled + ring.stage, Here::kXBytes);
      sm90::copy_box(x + ring.stage * Here::kXBytes, &arguments.hidden, 0, token, filled + ring.stage);
    }
    return;
  }

  if constexpr (Here::kMovesRegisters) sm90::take_registers<kConsumingRegisters>();
  if constexpr (TABLE) {
    for (int i = threadIdx.x; i < Here::kTableBytes / 4; i += kConsumers)
      reinterpret_cast<uint32_t*>(table)[i] = table_entry(call.values, SUMS, i / (kEntryBytes / 4));
    sm90::named_barrier_sync(kConsumerBarrier, kConsumers);
  }

  const uint64_t x_tile = sm90::swizzled_tile(sm90::shared_address(x));
  const Decoder<TABLE, SUMS> decoder(table, arguments.base_pair, call.values[0], lane);
  const uint32_t group_lines = arguments.group_inputs / kLineInputs;
  const int box_groups = arguments.box_groups;
  const int warp_box = warp * box_groups * kLineRows;  // elements before this warp's in a box
  const uint8_t* const warp_scales = scales + warp_box * size_of(call.scales.type);
  const uint8_t* const warp_offsets = offsets + warp_box * size_of(call.offsets.type);
  const bool has_offsets = !SUMS && call.offsets.data != nullptr;
  const auto decode = [&](uint32_t (&a)[kFragment], float2& scale, int step, int s) {
    const GroupBox scale_box{warp_scales + s * Here::kScaleBytes, call.scales.type};
    const GroupBox offset_box{has_offsets ? warp_offsets + s * Here::kOffsetBytes : nullptr,
                              call.offsets.type};
    const uint32_t line = box_groups == 1 ? 0 : static_cast<uint32_t>(step * kLines) % group_lines;
    decode_step(a, scale, codes + s * kCodeBytes + warp * kRowBlockBytes, scale_box, offset_box, box_groups,
                static_cast<int>(line), static_cast<int>(group_lines), decoder, lane);
  };

  constexpr int kInstruction = Here::kInstruction, kParts = Here::kParts;
  float sums[kParts][kInstruction / 2] = {};
  float of_step[SUMS ? kParts : 1][SUMS ? kInstruction / 2 : 1];
  uint32_t a[2][kFragment];
  float2 scale[2];
  sm90::barrier_wait(filled, 0);
  decode(a[0], scale[0], first_step, 0);
  for (int i = 0; i < count; i += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (i + half >= count) continue;
      const int s = ring.stage;
      pin<kInstruction>(sums);
      sm90::wgmma_fence();
      if constexpr (SUMS)
        multiply<kInstruction>(of_step, a[half], x_tile + s * (Here::kXBytes / 16), false);
      else
        multiply<kInstruction>(sums, a[half], x_tile + s * (Here::kXBytes / 16), true);
      sm90::wgmma_commit();

      ring.advance();
      if (i + half + 1 < count) {
        sm90::barrier_wait(filled + ring.stage, ring.parity);
        decode(a[half ^ 1], scale[half ^ 1], first_step + i + half + 1, ring.stage);
      }

      sm90::wgmma_wait();
      if constexpr (SUMS) {
        pin<kInstruction>(of_step);
#pragma unroll
        for (int n = 0; n < kInstruction / 2; ++n)
          sums[0][n] = fmaf(of_step[0][n], sum_place(0, n).row ? scale[half].y : scale[half].x, sums[0][n]);
      }
      pin<kInstruction>(sums);
      __syncwarp();
      if (lane == 0) sm90::barrier_arrive(emptied + s);
    }
  }

  const int64_t row = first_row + warp * kLineRows + 2 * (lane / 4);  // and the next one
  const bool is_whole = gridDim.z == 1;
  float add[2] = {0.0f, 0.0f}, factor[2] = {1.0f, 1.0f};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!is_whole || row + r >= call.out_features) continue;
    if (call.bias.data != nullptr) add[r] = load_one(call.bias.data, call.bias.type, row + r);
    if (call.out_scale.data != nullptr)
      factor[r] = load_one(call.out_scale.data, call.out_scale.type, row + r);
  }
  // the update is summed onto the base product, which for that is brought to the update's own scale
  const float before = updates ? 1.0f / call.scale : 1.0f, after = updates ? call.scale : 1.0f;
#pragma unroll
  for (int part = 0; part < kParts; ++part)
#pragma unroll
    for (int n = 0; n < kInstruction / 2; ++n) {
      const int r = sum_place(0, n).row;
      sums[part][n] = (sums[part][n] + add[r]) * (factor[r] * before);
    }
  if (updates) {
    load_up(a[0], call, first_row + warp * kLineRows, lane);
    sm90::barrier_wait(filled + ring.stage, ring.parity);
    pin<kInstruction>(sums);
    sm90::wgmma_fence();
    multiply<kInstruction>(sums, a[0], x_tile + ring.stage * (Here::kXBytes / 16), true);
    sm90::wgmma_commit();
    sm90::wgmma_wait();
    pin<kInstruction>(sums);
  }

  const auto store = [&](auto write) {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int n = 0; n < kInstruction / 2; ++n) {
        if (sum_place(0, n).row != 0) continue;  // n and n + 2 are neighbours in y
        const int64_t token = first_token + part * kInstruction + sum_place(lane, n).column;
        if (token < call.tokens) write(token, sums[part][n] * after, sums[part][n + 2] * after);
      }
  };
  __nv_bfloat16* const y = static_cast<__nv_bfloat16*>(call.y) + row;
  const int64_t n_rows = call.out_features, partial_rows = static_cast<int64_t>(gridDim.x) * kPackedRows;
  if (!is_whole) {
    float* const partial = call.partial + blockIdx.z * call.tokens * partial_rows + row;
    store([&](int64_t token, float first, float second) {
      *reinterpret_cast<float2*>(partial + token * partial_rows) = {first, second};
    });
  } else if (n_rows % 2 == 0) {
    if (row >= n_rows) return;
    store([&](int64_t token, float first, float second) {
      *reinterpret_cast<__nv_bfloat162*>(y + token * n_rows) = __floats2bfloat162_rn(first, second);
    });
  } else {
    store([&](int64_t token, float first, float second) {
      if (row < n_rows) y[token * n_rows] = __float2bfloat16_rn(first);
      if (row + 1 < n_rows) y[token * n_rows + 1] = __float2bfloat16_rn(second);
    });
  }
}

// y[t, o] = (sum over splits, in their order, + bias) out_scale
__global__ void __launch_bounds__(256) finish_splits_kernel(PackedLinear call) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, token = blockIdx.y;
  if (row >= call.out_features) return;
  const int64_t rows = (call.out_features + kPackedRows - 1) / kPackedRows * kPackedRows;
  float sum = 0.0f;
  for (int split = 0; split < call.splits; ++split)
    sum += call.partial[(split * call.tokens + token) * rows + row];
  if (call.bias.data != nullptr) sum += load_one(call.bias.data, call.bias.type, row);
  if (call.out_scale.data != nullptr) sum *= load_one(call.out_scale.data, call.out_scale.type, row);
  static_cast<__nv_bfloat16*>(call.y)[token * call.out_features + row] = __float2bfloat16_rn(sum);
}

__global__ void __launch_bounds__(256) nested_scales_kernel(NestedScales call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t row_block = i / (call.groups * kLineRows), group = i / kLineRows % call.groups;
  const int64_t row = row_block * kLineRows + i % kLineRows;
  if (row_block >= (call.out_features + kLineRows - 1) / kLineRows) return;
  float scale = 0.0f;
  if (row < call.out_features)
    scale = call.table[call.codes[i]] * call.absmax[(row * call.groups + group) / call.block] + call.offset;
  call.scales[i] = scale;
}

}  // namespace tw::packed
