// tensors as (pointer, row stride) -> csrc/linear: checks what pointers cannot say.
#include "linear/linear.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "check.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(const py::handle& address) {
  return reinterpret_cast<T*>(address.cast<int64_t>());
}

tw::DType dtype_of(const std::string& name) {
  if (name == "float32") return tw::DType::f32;
  if (name == "bfloat16") return tw::DType::bf16;
  if (name == "float16") return tw::DType::f16;
  tw::fail_check("fused_linear: dtype ", name, ", need float32, bfloat16 or float16");
}

// (data pointer, row stride in elements)
tw::Rows rows_of(const py::tuple& t) { return {pointer<void>(t[0]), t[1].cast<int64_t>()}; }

tw::Codes codes_of(const std::string& kind) {
  if (kind == "table") return tw::Codes::table;
  if (kind == "int8") return tw::Codes::int8;
  if (kind == "fp8") return tw::Codes::e4m3;
  tw::fail_check("fused_linear: codes ", kind, ", need table, int8 or fp8");
}

tw::ScaleType scale_type_of(const std::string& name) {
  if (name == "float32") return tw::ScaleType::f32;
  if (name == "float16") return tw::ScaleType::f16;
  if (name == "bfloat16") return tw::ScaleType::bf16;
  if (name == "uint8") return tw::ScaleType::nested;
  tw::fail_check("fused_linear: scales of ", name, ", need float32, float16, bfloat16 or nested uint8");
}

// (kind, table, codes, lines, scale type, scales, offsets, groups, group_size, nested table, nested absmax,
//  nested block, nested count, nested offset)
tw::PackedWeight packed_of(const py::tuple& t, int64_t n_in) {
  tw::PackedWeight w = {};
  w.kind = codes_of(t[0].cast<std::string>());
  const auto table = t[1].cast<std::vector<float>>();
  const size_t values = w.kind == tw::Codes::table ? tw::kTableCodes : 0;
  TW_CHECK(table.size() == values, "fused_linear: a table of ", table.size(), " values, need ", values);
  for (size_t i = 0; i < table.size(); ++i) w.table[i] = table[i];
  w.codes = pointer<const uint8_t>(t[2]);
  w.lines = t[3].cast<int64_t>();
  w.scale_type = scale_type_of(t[4].cast<std::string>());
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
  TW_CHECK(w.lines == (n_in + inputs - 1) / inputs, "fused_linear: ", w.lines, " lines for ", n_in,
           " inputs");
  TW_CHECK(w.group_size > 0 && w.groups == (n_in + w.group_size - 1) / w.group_size,
           "fused_linear: ", w.groups, " groups of ", w.group_size, " for ", n_in, " inputs");
  TW_CHECK(w.groups <= 1 || w.group_size % 8 == 0, "fused_linear: group_size is ", w.group_size,
           ", need a multiple of 8");
  TW_CHECK(w.scale_type != tw::ScaleType::nested || (w.nested_block > 0 && w.nested_count > 0),
           "fused_linear: nested scales without their second level");
  return w;
}

// dtype, (T, I, O, R), x, y, weight, packed or None, bias, out_scale, down, up, hidden,
// (scale, relu, row_adapters, column_adapters, column_scales, dropout_p, dropout_seed, input_order,
//  int8_activations), threads
tw::LinearCall call_of(const std::string& dtype, const py::tuple& extents, const py::tuple& x,
                       const py::tuple& y, const py::tuple& weight, const py::object& packed, int64_t bias,
                       int64_t out_scale, const py::tuple& down, const py::tuple& up, const py::tuple& hidden,
                       const py::tuple& rule, int threads) {
  tw::LinearCall call = {};
  call.dtype = dtype_of(dtype);
  call.tokens = extents[0].cast<int64_t>();
  call.in_features = extents[1].cast<int64_t>();
  call.out_features = extents[2].cast<int64_t>();
  call.rank = extents[3].cast<int>();
  TW_CHECK(call.tokens >= 0 && call.in_features >= 0 && call.out_features >= 0 && call.rank >= 0,
           "fused_linear: negative extent");
  TW_CHECK(threads >= 1, "fused_linear: threads is ", threads, ", need at least 1");
  call.x = rows_of(x);
  call.y = rows_of(y);
  call.weight = rows_of(weight);
  if (!packed.is_none()) call.packed = packed_of(packed.cast<py::tuple>(), call.in_features);
  call.bias = reinterpret_cast<const float*>(bias);
  call.out_scale = reinterpret_cast<const float*>(out_scale);
  call.down = rows_of(down);
  call.up = rows_of(up);
  call.hidden = rows_of(hidden);
  call.scale = rule[0].cast<float>();
  call.relu = rule[1].cast<bool>();
  call.row_adapters = pointer<const int32_t>(rule[2]);
  call.column_adapters = pointer<const int32_t>(rule[3]);
  call.column_scales = pointer<const float>(rule[4]);
  call.dropout_p = rule[5].cast<float>();
  call.dropout_seed = static_cast<uint64_t>(rule[6].cast<int64_t>());
  call.input_order = pointer<const int32_t>(rule[7]);
  call.int8_activations = rule[8].cast<bool>();
  call.threads = threads;
  const int64_t size = call.out_features * call.in_features;
  TW_CHECK(size == 0 || call.weight.data || call.packed.codes, "fused_linear: null pointer to ", size,
           " weights");
  TW_CHECK(!call.int8_activations || (!call.weight.data && call.packed.kind != tw::Codes::e4m3),
           "fused_linear: int8_activations needs a packed weight of whole-number codes");
  return call;
}

void expect_memory(bool had) {
  if (!had) throw std::runtime_error("fused_linear: no memory for scratch");
}

void forward(const std::string& dtype, const py::tuple& extents, const py::tuple& x, const py::tuple& y,
             const py::tuple& weight, const py::object& packed, int64_t bias, int64_t out_scale,
             const py::tuple& down, const py::tuple& up, const py::tuple& hidden, const py::tuple& rule,
             int threads) {
  const tw::LinearCall call =
      call_of(dtype, extents, x, y, weight, packed, bias, out_scale, down, up, hidden, rule, threads);
  if (call.tokens == 0 || call.out_features == 0) return;
  py::gil_scoped_release release;
  expect_memory(tw::linear_forward(call));
}

// gradients: dy, dx, (dbias, ddown, dup), 0 where not wanted
void backward(const py::tuple& dy, const py::tuple& dx, const py::tuple& gradients, const std::string& dtype,
              const py::tuple& extents, const py::tuple& x, const py::tuple& weight, const py::object& packed,
              int64_t out_scale, const py::tuple& down, const py::tuple& up, const py::tuple& hidden,
              const py::tuple& rule, int threads) {
  tw::LinearBackwardCall call = {};
  call.forward = call_of(dtype, extents, x, py::make_tuple(0, 0), weight, packed, 0, out_scale, down, up,
                         hidden, rule, threads);
  call.dy = rows_of(dy);
  call.dx = rows_of(dx);
  call.dbias = pointer<float>(gradients[0]);
  call.ddown = pointer<float>(gradients[1]);
  call.dup = pointer<float>(gradients[2]);
  py::gil_scoped_release release;
  expect_memory(tw::linear_backward(call));
}

}  // namespace

void register_linear(py::module_& m) {
  m.def("linear_forward", &forward);
  m.def("linear_backward", &backward);
}
