// The Hopper kernel over packed weights as a library for the host, for tests/test_linear_hopper.py.
#include "linear/packed_kernel.cuh"

namespace tw::packed {

alignas(1024) uint8_t x[227 * 1024];  // the kernel's dynamic shared memory

template <bool TABLE, bool SUMS, int TOKENS>
bool run(const Arguments& arguments, dim3 grid, bool late) {
  using Here = Layout<TABLE, SUMS, TOKENS>;
  static_assert(Here::kBytes <= sizeof(x), "more than a block can be given");
  return sm90::run_grid(grid, Here::kThreads, x, Here::kBytes, late,
                        [&] { packed_linear_kernel<TABLE, SUMS, TOKENS>(arguments); });
}

template <bool SUMS, int TOKENS>
bool run(const Arguments& arguments, dim3 grid, bool late) {
  return arguments.call.counts ? run<false, SUMS, TOKENS>(arguments, grid, late)
                               : run<true, SUMS, TOKENS>(arguments, grid, late);
}

bool run(const Arguments& arguments, dim3 grid, bool late) {
  const PackedLinear& call = arguments.call;
  if (call.sums && call.tile == 16) return run<true, 16>(arguments, grid, late);
  if (call.sums && call.tile == 32) return run<true, 32>(arguments, grid, late);
  if (call.sums && call.tile == 64) return run<true, 64>(arguments, grid, late);
  if (call.sums) return false;
  if (call.tile == 32) return run<false, 32>(arguments, grid, late);
  if (call.tile == 128) return run<false, 128>(arguments, grid, late);
  return call.tile == 256 && run<false, 256>(arguments, grid, late);
}

// Each thread of a kernel whose threads do not meet, one after the other.
template <class Kernel>
void run_threads(dim3 grid, int threads, Kernel kernel) {
  gridDim = grid;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < static_cast<uint32_t>(threads); ++threadIdx.x) kernel();
}

}  // namespace tw::packed

using namespace tw::packed;

extern "C" size_t packed_linear_bytes() { return sizeof(tw::PackedLinear); }
extern "C" size_t nested_scales_bytes() { return sizeof(tw::NestedScales); }

// 0, or 1 if a tensor map was refused, 2 if the kernel was stuck or broke a rule
extern "C" int packed_linear(const tw::PackedLinear* call, bool late) {
  Arguments arguments{};
  if (prepare(arguments, *call) != nullptr) return 1;
  const auto tiles = [](int64_t n, int64_t size) { return static_cast<uint32_t>((n + size - 1) / size); };
  const dim3 grid(tiles(call->out_features, tw::kPackedRows), tiles(call->tokens, call->tile), call->splits);
  if (!run(arguments, grid, late)) return 2;
  const dim3 rows(tiles(call->out_features, 256), static_cast<uint32_t>(call->tokens));
  if (call->splits > 1) run_threads(rows, 256, [&] { finish_splits_kernel(*call); });
  return 0;
}

extern "C" void resolve_nested_scales(const tw::NestedScales* call) {
  const int64_t count = (call->out_features + 15) / 16 * 16 * call->groups;
  run_threads(dim3(static_cast<uint32_t>((count + 255) / 256)), 256, [&] { nested_scales_kernel(*call); });
}
