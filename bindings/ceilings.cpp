// The machine's own ceilings, for the benchmarks.
#include "bench/ceilings.h"

#include <pybind11/pybind11.h>

#include "check.h"

namespace py = pybind11;

namespace {

template <double (*CEILING)(int64_t, int)>
double measured(int64_t rounds, int threads) {
  TW_CHECK(rounds >= 0, "ceiling: rounds is ", rounds, ", need at least 0");
  TW_CHECK(threads >= 1, "ceiling: threads is ", threads, ", need at least 1");
  py::gil_scoped_release release;
  return CEILING(rounds, threads);
}

double read_sum(int64_t address, int64_t n, int streams, int threads) {
  TW_CHECK(address != 0 || n == 0, "ceiling_read: null pointer to ", n, " floats");
  TW_CHECK(n >= 0, "ceiling_read: n is ", n, ", need at least 0");
  TW_CHECK(threads >= 1, "ceiling_read: threads is ", threads, ", need at least 1");
  bool known = false;
  double sum = 0.0;
  {
    py::gil_scoped_release release;
    sum = tw::ceiling_read(reinterpret_cast<const float*>(address), n, streams, threads, &known);
  }
  TW_CHECK(known, "ceiling_read: streams is ", streams, ", need 1, 2, 4 or 8");
  return sum;
}

}  // namespace

void register_ceilings(py::module_& m) {
  m.def("ceiling_fma", &measured<tw::ceiling_fma>);
  m.def("ceiling_bf16_dot", &measured<tw::ceiling_bf16_dot>);
  m.def("ceiling_int8_dot", &measured<tw::ceiling_int8_dot>);
  m.def("ceiling_read", &read_sum);
}
