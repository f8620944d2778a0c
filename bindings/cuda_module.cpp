// The module tilewright._cuda: optional, built where nvcc is found; imports without a driver.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

void register_cuda_linear(py::module_& m);

// The kernels are compiled for sm_90a alone, which no other compute capability can run.
constexpr int kMajor = 9, kMinor = 0;

// None if the device can run the kernels, else the reason: the runtime's own words where it has some.
static py::object why_not(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return py::str(cudaGetErrorString(error));
  if (count == 0) return py::str("no CUDA device");
  if (device < 0 || device >= count)
    return py::str("no CUDA device " + std::to_string(device) + ", there are " + std::to_string(count));
  int major = 0, minor = 0;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return py::str(cudaGetErrorString(error));
  if (major != kMajor || minor != kMinor)
    return py::str("CUDA device " + std::to_string(device) + " has compute capability " +
                   std::to_string(major) + "." + std::to_string(minor) + ", need " + std::to_string(kMajor) +
                   "." + std::to_string(kMinor));
  return py::none();
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of tilewright for Hopper (sm_90a)";
  m.attr("version") = TILEWRIGHT_VERSION;
  m.attr("runtime_version") = CUDART_VERSION;  // 1000 * major + 10 * minor
  m.def("why_not", &why_not, py::arg("device") = 0);
  register_cuda_linear(m);
}
