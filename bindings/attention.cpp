#include <pybind11/pybind11.h>

void register_attention(pybind11::module_& m) {}
