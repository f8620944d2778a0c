// tensors as (pointer, row stride) -> csrc/sparse: checks what pointers cannot say.
#include "sparse/sparse.h"

#include <pybind11/pybind11.h>

#include <string>

#include "packed.h"

namespace py = pybind11;

namespace {

// (T, I, O), then dy and x as (pointer, row stride in elements), k, pointer to (k) places, threads; returns
// how many places were written
int64_t largest(const std::string& dtype, const py::tuple& extents, const py::tuple& dy, const py::tuple& x,
                int64_t k, int64_t places, int threads) {
  const char* op = "largest_gradients";
  tw::LargestCall call = {};
  call.dtype = dtype_of(op, dtype);
  call.tokens = extents[0].cast<int64_t>();
  call.in_features = extents[1].cast<int64_t>();
  call.out_features = extents[2].cast<int64_t>();
  call.dy = pointer<const void>(dy[0]);
  call.dy_row = dy[1].cast<int64_t>();
  call.x = pointer<const void>(x[0]);
  call.x_row = x[1].cast<int64_t>();
  call.k = k;
  call.places = reinterpret_cast<int64_t*>(places);
  call.threads = threads;
  TW_CHECK(call.tokens >= 0 && call.in_features >= 0 && call.out_features >= 0, op, ": negative extent");
  TW_CHECK(call.in_features <= INT32_MAX && call.out_features <= INT32_MAX, op, ": extents are ",
           call.out_features, " and ", call.in_features, ", need at most ", INT32_MAX);
  TW_CHECK(k >= 0 && k <= call.in_features * call.out_features, op, ": k is ", k, ", need 0 to ",
           call.in_features * call.out_features);
  TW_CHECK(threads >= 1, op, ": threads is ", threads, ", need at least 1");
  int64_t found = 0;
  call.found = &found;
  py::gil_scoped_release release;
  if (k > 0 && !tw::sparse_largest(call))
    throw std::runtime_error("largest_gradients: no memory for scratch");
  return found;
}

}  // namespace

void register_sparse(py::module_& m) { m.def("sparse_largest", &largest); }
