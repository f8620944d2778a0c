// Stands in for csrc/common/sm90.cuh where there is no GPU: a block's threads are threads of the host, and
// each instruction does what the PTX manual says of it (registers of wgmma, swizzle, barrier phases, zeros
// outside a tensor). The kernel's own code runs unchanged on top.
//
// Products run either when they are issued or only when they are waited for: a kernel that touches operands
// too early, or reads sums too early, is wrong in one of the two.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "common/sm90_descriptor.h"

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 gridDim;
using std::min;

namespace tw::sm90 {

constexpr uint32_t kSharedBase = 1024;  // where a block's dynamic shared memory starts on the GPU too
constexpr int kMaxThreads = 384;
constexpr auto kPatience = std::chrono::seconds(20);

// One lock for all: nothing here is in a hurry.
struct Block {
  std::mutex lock;
  std::condition_variable changed;
  bool failed = false;
  uint8_t* shared = nullptr;
  bool late_products = false;
  struct Meeting {
    int arrived = 0, round = 0;
  } all, named[16], warps[kMaxThreads / 32], groups[kMaxThreads / 128];
  uint32_t posted[2][kMaxThreads][4];

  template <class Done>
  void wait(std::unique_lock<std::mutex>& held, Done done) {
    changed.wait_for(held, kPatience, [&] { return failed || done(); });
    if (!done()) fail();
  }
  [[noreturn]] void fail() {
    failed = true;
    changed.notify_all();
    throw std::runtime_error("stuck, or broke a rule");
  }
  void meet(Meeting& meeting, int threads) {
    std::unique_lock<std::mutex> held(lock);
    const int round = meeting.round;
    if (++meeting.arrived == threads) {
      meeting.arrived = 0;
      ++meeting.round;
      changed.notify_all();
      return;
    }
    wait(held, [&] { return meeting.round != round; });
  }
  void require(bool holds) {
    if (holds) return;
    std::unique_lock<std::mutex> held(lock);
    fail();
  }
};
inline Block* block = nullptr;
inline int block_threads = 0;

inline int lane_index() { return threadIdx.x % 32; }
inline int warp_index() { return threadIdx.x / 32; }

inline uint32_t shared_address(const void* p) {
  return kSharedBase + static_cast<uint32_t>(static_cast<const uint8_t*>(p) - block->shared);
}
inline uint8_t* at_shared(uint32_t address) { return block->shared + (address - kSharedBase); }

// bits 4-6 of an address are flipped by bits 7-9
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// --- mbarrier ---

struct Barrier {
  int32_t bytes;
  uint8_t arrivals, missing;
  uint16_t phase;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

inline void change(uint64_t* where, int arrivals, int bytes) {
  std::unique_lock<std::mutex> held(block->lock);
  Barrier* barrier = reinterpret_cast<Barrier*>(where);
  barrier->bytes += bytes;
  if (barrier->missing < arrivals) block->fail();
  barrier->missing -= arrivals;
  if (barrier->missing != 0 || barrier->bytes != 0) return;
  barrier->missing = barrier->arrivals;
  ++barrier->phase;
  block->changed.notify_all();
}
inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  const Barrier fresh{0, static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0};
  memcpy(barrier, &fresh, sizeof fresh);
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t* barrier) { change(barrier, 1, 0); }
inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { change(barrier, 1, bytes); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  std::unique_lock<std::mutex> held(block->lock);
  block->wait(held, [&] { return (reinterpret_cast<Barrier*>(barrier)->phase & 1) != parity; });
}
inline void named_barrier_sync(int id, int threads) { block->meet(block->named[id], threads); }

template <int COUNT>
void give_registers_back() {}
template <int COUNT>
void take_registers() {}

// --- copy engine ---

struct Map {
  const uint8_t* data;
  int64_t rows, columns, stride_bytes;
  int box_rows, box_columns, element_bytes;
  bool swizzles;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

inline const char* make_map(CUtensorMap* to, CUtensorMapDataType type, const void* data, int64_t rows,
                            int64_t columns, int64_t stride_bytes, int box_rows, int box_columns,
                            CUtensorMapSwizzle swizzle) {
  const bool is_wide = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 || type == CU_TENSOR_MAP_DATA_TYPE_UINT32;
  const Map map{static_cast<const uint8_t*>(data),
                rows,
                columns,
                stride_bytes,
                box_rows,
                box_columns,
                is_wide ? 4 : 2,
                swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
  const int row_bytes = box_columns * map.element_bytes;
  const bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0 && rows > 0 &&
                    columns > 0 && box_rows > 0 && box_rows <= 256 && box_columns > 0 && box_columns <= 256 &&
                    row_bytes % 16 == 0 && (!map.swizzles || row_bytes <= 128);
  memcpy(to, &map, sizeof map);
  return fits ? nullptr : "refused a tensor map";
}

inline void copy_box(void* to, const CUtensorMap* from, int column, int row, uint64_t* barrier) {
  Map map;
  memcpy(&map, from, sizeof map);
  const uint32_t start = shared_address(to);
  const int row_bytes = map.box_columns * map.element_bytes;
  block->require(start % (map.swizzles ? 1024 : 128) == 0);
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < map.box_columns; ++c) {
      const uint32_t address = start + r * row_bytes + c * map.element_bytes;
      uint8_t* place = at_shared(map.swizzles ? swizzled(address) : address);
      if (row + r < map.rows && column + c < map.columns)
        memcpy(place, map.data + (row + r) * map.stride_bytes + int64_t{column + c} * map.element_bytes,
               map.element_bytes);
      else
        memset(place, 0, map.element_bytes);
    }
  change(barrier, 0, -map.box_rows * row_bytes);
}

// --- wgmma ---

struct Product {
  float* d;
  int registers;
  const uint32_t* a;
  uint64_t b;
  bool adds;
};
inline thread_local std::vector<Product> issued;
inline thread_local int products = 0;

inline float bfloat16_at(uint32_t word, int half) {
  const uint32_t word32 = half ? word & 0xffff0000 : word << 16;
  float value;
  memcpy(&value, &word32, sizeof value);
  return value;
}

inline void multiply_now(const Product& p) {
  const int group = threadIdx.x / 128, lane = lane_index(), warp = warp_index();
  auto& posted = block->posted[products++ % 2];
  for (int i = 0; i < 4; ++i) posted[threadIdx.x][i] = p.a[i];
  block->meet(block->groups[group], 128);
  // element (row, column) of a warp's 16 x 16 part of A
  const auto a = [&](int row, int column) {
    const int holder = 32 * warp + 4 * (row % 8) + column % 8 / 2;
    return bfloat16_at(posted[holder][row / 8 + 2 * (column / 8)], column % 2);
  };
  block->require(p.b >> 62 == 1);  // the 128-byte swizzle
  const uint32_t start = (p.b & 0x3fff) << 4, eight_rows = (p.b >> 32 & 0x3fff) << 4;
  const auto b = [&](int k, int n) {
    uint16_t value;
    memcpy(&value, at_shared(swizzled(start + n / 8 * eight_rows + n % 8 * 128 + 2 * k)), sizeof value);
    return bfloat16_at(value, 0);
  };
  for (int i = 0; i < p.registers; ++i) {
    const int row = lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    float sum = p.adds ? p.d[i] : 0.0f;
    for (int k = 0; k < 16; ++k) sum += a(row, k) * b(k, column);
    p.d[i] = sum;
  }
}

template <int REGISTERS>
void wgmma(float (&d)[REGISTERS], const uint32_t* a, uint64_t b, bool adds) {
  const Product product{d, REGISTERS, a, b, adds};
  if (block->late_products)
    issued.push_back(product);
  else
    multiply_now(product);
}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
inline void wgmma_wait() {
  for (const Product& product : issued) multiply_now(product);
  issued.clear();
}
template <int COUNT>
void pin(float (&)[COUNT]) {}

// --- a grid of blocks, one after the other ---

// `kernel` is called once in each thread; false if it was stuck or broke a rule.
template <class Kernel>
bool run_grid(dim3 grid, int threads, uint8_t* shared, size_t shared_bytes, bool late_products,
              Kernel kernel) {
  for (uint32_t z = 0; z < grid.z; ++z)
    for (uint32_t y = 0; y < grid.y; ++y)
      for (uint32_t x = 0; x < grid.x; ++x) {
        Block here;
        here.shared = shared;
        here.late_products = late_products;
        memset(shared, 0xff, shared_bytes);  // NaN, in every format
        block = &here;
        block_threads = threads;
        std::vector<std::thread> running;
        for (int t = 0; t < threads; ++t)
          running.emplace_back([&, t] {
            threadIdx = {static_cast<uint32_t>(t), 0, 0};
            blockIdx = {x, y, z};
            gridDim = grid;
            try {
              kernel();
            } catch (const std::runtime_error&) {
            }
          });
        for (std::thread& thread : running) thread.join();
        if (here.failed) return false;
      }
  return true;
}

}  // namespace tw::sm90

inline void __syncthreads() { tw::sm90::block->meet(tw::sm90::block->all, tw::sm90::block_threads); }
inline void __syncwarp() { tw::sm90::block->meet(tw::sm90::block->warps[tw::sm90::warp_index()], 32); }
inline void __trap() { tw::sm90::block->require(false); }
template <class T>
T __shfl_sync(uint32_t, T value, int) {
  return value;  // the kernel hands round what all lanes have
}
