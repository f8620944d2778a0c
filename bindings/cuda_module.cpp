// The module tilewright._cuda: optional, built where nvcc is found; imports without a driver.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

// None if a device can be used, else the runtime's own words.
static py::object why_not() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return py::str(cudaGetErrorString(error));
  if (count == 0) return py::str("no CUDA device");
  return py::none();
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of tilewright for Hopper (sm_90a)";
  m.attr("version") = TILEWRIGHT_VERSION;
  m.attr("runtime_version") = CUDART_VERSION;
  m.def("why_not", &why_not);
}
