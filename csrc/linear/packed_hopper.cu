// Launches the kernels over 4-bit packed weights, and lists which of them are compiled.
#include "linear/packed_kernel.cuh"

namespace tw {
namespace {

using namespace packed;

const char* finished(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <bool TABLE, bool SUMS, int TOKENS>
cudaError_t launch(const Arguments& arguments, dim3 grid, cudaStream_t stream) {
  constexpr int kBytes = Layout<TABLE, SUMS, TOKENS>::kBytes;
  const auto kernel = packed_linear_kernel<TABLE, SUMS, TOKENS>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, Layout<TABLE, SUMS, TOKENS>::kThreads, kBytes, stream>>>(arguments);
  return cudaGetLastError();
}

struct Built {
  bool counts, sums;
  int tile;
  cudaError_t (*launch)(const Arguments&, dim3, cudaStream_t);
};

// Sums of steps need registers beside the sums of all, and pay while tokens are few.
constexpr Built kBuilt[] = {
    {true, true, 16, launch<false, true, 16>},     {false, true, 16, launch<true, true, 16>},
    {true, true, 32, launch<false, true, 32>},     {false, true, 32, launch<true, true, 32>},
    {true, true, 64, launch<false, true, 64>},     {false, true, 64, launch<true, true, 64>},
    {true, false, 32, launch<false, false, 32>},   {false, false, 32, launch<true, false, 32>},
    {true, false, 128, launch<false, false, 128>}, {false, false, 128, launch<true, false, 128>},
    {true, false, 256, launch<false, false, 256>}, {false, false, 256, launch<true, false, 256>},
};

const Built* find_built(bool counts, bool sums, int tile) {
  for (const Built& built : kBuilt)
    if (built.counts == counts && built.sums == sums && built.tile == tile) return &built;
  return nullptr;
}

}  // namespace

bool packed_linear_is_built(bool counts, bool sums, int tile) {
  return find_built(counts, sums, tile) != nullptr;
}

const char* packed_linear_hopper(const PackedLinear& call) {
  const Built* built = find_built(call.counts, call.sums, call.tile);
  if (built == nullptr) return "no kernel was compiled for this choice";
  cudaError_t error = cudaSetDevice(call.device);
  if (error != cudaSuccess) return cudaGetErrorString(error);

  Arguments arguments{};
  const char* wrong = prepare(arguments, call);
  if (wrong != nullptr) return wrong;

  const dim3 grid(static_cast<uint32_t>((call.out_features + kPackedRows - 1) / kPackedRows),
                  static_cast<uint32_t>((call.tokens + call.tile - 1) / call.tile), call.splits);
  const cudaStream_t stream = static_cast<cudaStream_t>(call.stream);
  error = built->launch(arguments, grid, stream);
  if (error != cudaSuccess || call.splits == 1) return finished(error);
  const dim3 rows(static_cast<uint32_t>((call.out_features + 255) / 256), static_cast<uint32_t>(call.tokens));
  finish_splits_kernel<<<rows, 256, 0, stream>>>(call);
  return finished(cudaGetLastError());
}

const char* resolve_nested_scales(const NestedScales& call) {
  const cudaError_t error = cudaSetDevice(call.device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t count = (call.out_features + kLineRows - 1) / kLineRows * kLineRows * call.groups;
  nested_scales_kernel<<<static_cast<uint32_t>((count + 255) / 256), 256, 0,
                         static_cast<cudaStream_t>(call.stream)>>>(call);
  return finished(cudaGetLastError());
}

}  // namespace tw
