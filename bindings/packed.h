// What the bindings of rooms with packed weights share: a weight's pointers and sizes out of a Python tuple.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "common/packed_weight.h"

namespace {

namespace py = pybind11;

template <class T>
inline T* pointer(const py::handle& address) {
  return reinterpret_cast<T*>(address.cast<int64_t>());
}

inline tw::DType dtype_of(const char* op, const std::string& name) {
  if (name == "float32") return tw::DType::f32;
  if (name == "bfloat16") return tw::DType::bf16;
  if (name == "float16") return tw::DType::f16;
  tw::fail_check(op, ": dtype ", name, ", need float32, bfloat16 or float16");
}

inline tw::Codes codes_of(const char* op, const std::string& kind) {
  if (kind == "table") return tw::Codes::table;
  if (kind == "int8") return tw::Codes::int8;
  if (kind == "fp8") return tw::Codes::e4m3;
  tw::fail_check(op, ": codes ", kind, ", need table, int8 or fp8");
}

inline tw::ScaleType scale_type_of(const char* op, const std::string& name) {
  if (name == "float32") return tw::ScaleType::f32;
  if (name == "float16") return tw::ScaleType::f16;
  if (name == "bfloat16") return tw::ScaleType::bf16;
  if (name == "uint8") return tw::ScaleType::nested;
  tw::fail_check(op, ": scales of ", name, ", need float32, float16, bfloat16 or nested uint8");
}

// (kind, table, codes, lines, scale type, scales, offsets, groups, group_size, nested table, nested absmax,
//  nested block, nested count, nested offset)
inline tw::PackedWeight packed_of(const char* op, const py::tuple& t, int64_t n_in) {
  tw::PackedWeight w = {};
  w.kind = codes_of(op, t[0].cast<std::string>());
  const auto table = t[1].cast<std::vector<float>>();
  const size_t values = w.kind == tw::Codes::table ? tw::kTableCodes : 0;
  TW_CHECK(table.size() == values, op, ": a table of ", table.size(), " values, need ", values);
  for (size_t i = 0; i < table.size(); ++i) w.table[i] = table[i];
  w.codes = pointer<const uint8_t>(t[2]);
  w.lines = t[3].cast<int64_t>();
  w.scale_type = scale_type_of(op, t[4].cast<std::string>());
  w.scales = pointer<const void>(t[5]);
  w.offsets = pointer<const void>(t[6]);
  w.groups = t[7].cast<int64_t>();
  w.group_size = t[8].cast<int64_t>();
  w.nested_table = pointer<const float>(t[9]);
  w.nested_absmax = pointer<const float>(t[10]);
  w.nested_block = t[11].cast<int64_t>();
  w.nested_count = t[12].cast<int64_t>();
  w.nested_offset = t[13].cast<float>();
  const int64_t inputs = tw::line_inputs(w.kind);
  TW_CHECK(w.lines == (n_in + inputs - 1) / inputs, op, ": ", w.lines, " lines for ", n_in, " inputs");
  TW_CHECK(w.group_size > 0 && w.groups == (n_in + w.group_size - 1) / w.group_size, op, ": ", w.groups,
           " groups of ", w.group_size, " for ", n_in, " inputs");
  TW_CHECK(w.groups <= 1 || w.group_size % 8 == 0, op, ": group_size is ", w.group_size,
           ", need a multiple of 8");
  TW_CHECK(w.scale_type != tw::ScaleType::nested || (w.nested_block > 0 && w.nested_count > 0), op,
           ": nested scales without their second level");
  return w;
}

}  // namespace
