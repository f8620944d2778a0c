// The module tilewright._C: one line a room.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "check.h"
#include "common/isa.h"

namespace py = pybind11;

void register_attention(py::module_& m);
void register_ceilings(py::module_& m);
void register_decode(py::module_& m);
void register_linear(py::module_& m);
void register_loss(py::module_& m);
void register_norm(py::module_& m);
void register_moe(py::module_& m);
void register_optim(py::module_& m);
void register_quant(py::module_& m);
void register_recording(py::module_& m);
void register_sparse(py::module_& m);

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of tilewright";
  m.attr("version") = TILEWRIGHT_VERSION;
  m.def("isa", [] { return std::string(tw::isa_name(tw::current_isa())); });
  m.def("best_isa", [] { return std::string(tw::isa_name(tw::best_isa())); });
  m.def("isa_levels", [] {
    std::vector<std::string> names;
    for (int i = 0; i < tw::kIsaCount; ++i)
      if (tw::isa_is_built(static_cast<tw::Isa>(i))) names.push_back(tw::isa_name(static_cast<tw::Isa>(i)));
    return names;
  });
  m.def("set_isa", [](const std::string& name) {
    for (int i = 0; i < tw::kIsaCount; ++i) {
      if (name != tw::isa_name(static_cast<tw::Isa>(i))) continue;
      TW_CHECK(tw::set_isa(static_cast<tw::Isa>(i)), "set_isa: this machine or build has no ", name,
               "; its best level is ", tw::isa_name(tw::best_isa()));
      return;
    }
    tw::fail_check("set_isa: no level \"", name, "\". Known: portable, avx2, avx512, avx512_bf16, amx");
  });
  register_attention(m);
  register_ceilings(m);
  register_decode(m);
  register_linear(m);
  register_loss(m);
  register_norm(m);
  register_moe(m);
  register_optim(m);
  register_quant(m);
  register_recording(m);
  register_sparse(m);
}
