// tensors as pointers and extents -> csrc/linear on the GPU: checks what the copy engine and the kernel rely
// on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>

#include "check.h"
#include "linear/linear_hopper.h"

namespace py = pybind11;

namespace {

constexpr int64_t kMaxInputs = int64_t{1} << 29;  // coordinates of the copy engine are 32-bit
constexpr int64_t kMaxGrid = 65535;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype), or None
tw::RealArray real_array(const char* name, const py::object& given) {
  if (given.is_none()) return {nullptr, tw::Real::f32};
  const py::tuple pair = given.cast<py::tuple>();
  const void* data = pointer<const void>(pair[0].cast<int64_t>());
  const std::string type = pair[1].cast<std::string>();
  if (type == "float32") return {data, tw::Real::f32};
  if (type == "bfloat16") return {data, tw::Real::bf16};
  if (type == "float16") return {data, tw::Real::f16};
  tw::fail_check("packed_linear: ", name, " is ", type, ", need float32, bfloat16 or float16");
}

// What the copy engine reads starts at a multiple of 16.
void check_copied(const char* name, const void* data) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  TW_CHECK(address != 0, "packed_linear: ", name, " is a null pointer");
  TW_CHECK(address % 16 == 0, "packed_linear: ", name, " is at address ", address, ", need a multiple of 16");
}

void check_stride(const char* name, int64_t stride, int64_t columns) {
  TW_CHECK(stride % 8 == 0 && stride >= columns, "packed_linear: rows of ", name, " are ", stride,
           " elements apart, need a multiple of 8 and at least ", columns);
}

void check(const tw::PackedLinear& call) {
  TW_CHECK(call.tokens >= 1 && call.out_features >= 1, "packed_linear: T is ", call.tokens, " and O is ",
           call.out_features, ", need at least 1");
  TW_CHECK(call.in_features >= 8 && call.in_features % 8 == 0 && call.in_features <= kMaxInputs,
           "packed_linear: I is ", call.in_features, ", need a multiple of 8 from 8 to ", kMaxInputs);
  TW_CHECK(tw::packed_linear_is_built(call.counts, call.sums, call.tile),
           "packed_linear: no kernel for tile ", call.tile, " with sums = ", call.sums,
           " and counts = ", call.counts);
  TW_CHECK((call.tokens + call.tile - 1) / call.tile <= kMaxGrid, "packed_linear: T is ", call.tokens,
           ", need at most ", kMaxGrid, " tiles of ", call.tile);
  check_copied("x", call.x);
  check_stride("x", call.x_stride, call.in_features);
  check_copied("codes", call.codes);
  check_copied("scales", call.scales.data);
  if (call.offsets.data != nullptr) check_copied("offsets", call.offsets.data);
  TW_CHECK(call.y != nullptr, "packed_linear: y is a null pointer");

  const int64_t size = call.group_size, groups = call.groups;
  TW_CHECK(groups == 1 || (size >= 8 && size % 8 == 0), "packed_linear: group_size is ", size,
           ", need a multiple of 8, or one group");
  TW_CHECK(size >= 1 && groups >= 1 && (groups - 1) * size < call.in_features &&
               groups * size + 7 >= call.in_features,
           "packed_linear: ", groups, " groups of ", size, " inputs do not make up I = ", call.in_features);
  TW_CHECK(!call.sums || (call.offsets.data == nullptr && (groups == 1 || size % tw::kPackedInputs == 0)),
           "packed_linear: sums with group_size ", size, call.offsets.data ? " and" : " and no",
           " offsets, need a multiple of ", tw::kPackedInputs, " and no offsets");

  const int64_t steps = (call.in_features + tw::kPackedInputs - 1) / tw::kPackedInputs;
  const bool splits_fit = call.splits >= 1 && call.splits <= kMaxGrid && call.splits <= steps &&
                          (call.splits - 1) * ((steps + call.splits - 1) / call.splits) < steps;
  TW_CHECK(splits_fit, "packed_linear: splits is ", call.splits, ", need some of ", steps, " steps for each");
  TW_CHECK(call.splits == 1 || call.partial != nullptr, "packed_linear: partial is a null pointer with ",
           call.splits, " splits");
  TW_CHECK(call.rank >= 0 && call.rank <= tw::kPackedMaxRank, "packed_linear: R is ", call.rank,
           ", need 0 to ", tw::kPackedMaxRank);
  if (call.rank == 0) return;
  check_copied("hidden", call.hidden);
  check_stride("hidden", call.hidden_stride, call.rank);
  TW_CHECK(call.up != nullptr, "packed_linear: up is a null pointer");
  TW_CHECK(call.scale != 0.0f, "packed_linear: scale is 0, need another number");
  TW_CHECK(call.splits == 1 || call.out_scale.data == nullptr, "packed_linear: ", call.splits,
           " splits with a low-rank update and out_scale, need 1");
}

void launched(const char* name, const char* wrong) {
  if (wrong != nullptr) throw std::runtime_error(std::string(name) + ": " + wrong);
}

// x, hidden: (address, row stride); scales .. out_scale: (address, dtype) or None
void packed_linear(int64_t tokens, int64_t in_features, int64_t out_features, std::pair<int64_t, int64_t> x,
                   int64_t codes, const py::object& scales, const py::object& offsets, int64_t group_size,
                   int64_t groups, const std::array<float, 16>& values, const py::object& bias,
                   const py::object& out_scale, std::pair<int64_t, int64_t> hidden, int64_t up, int rank,
                   float scale, int64_t y, int64_t partial, int tile, bool sums, int splits, int device,
                   int64_t stream) {
  tw::PackedLinear call{};
  call.tokens = tokens;
  call.in_features = in_features;
  call.out_features = out_features;
  call.x = pointer<const void>(x.first);
  call.x_stride = x.second;
  call.codes = pointer<const void>(codes);
  call.scales = real_array("scales", scales);
  call.offsets = real_array("offsets", offsets);
  call.group_size = group_size;
  call.groups = groups;
  call.counts = values[0] >= -128.0f && values[0] <= 112.0f;
  for (int c = 0; c < 16; ++c) {
    call.values[c] = values[c];
    call.counts = call.counts && values[c] == values[0] + c && values[c] == static_cast<int>(values[c]);
  }
  call.bias = real_array("bias", bias);
  call.out_scale = real_array("out_scale", out_scale);
  call.hidden = pointer<const void>(hidden.first);
  call.hidden_stride = hidden.second;
  call.up = pointer<const void>(up);
  call.rank = rank;
  call.scale = scale;
  call.y = pointer<void>(y);
  call.partial = pointer<float>(partial);
  call.tile = tile;
  call.sums = sums;
  call.splits = splits;
  call.device = device;
  call.stream = pointer<void>(stream);
  check(call);
  py::gil_scoped_release release;
  launched("packed_linear", tw::packed_linear_hopper(call));
}

void resolve_nested_scales(int64_t codes, int64_t table, int64_t absmax, float offset, int64_t block,
                           int64_t out_features, int64_t groups, int64_t scales, int device, int64_t stream) {
  TW_CHECK(codes && table && absmax && scales, "resolve_nested_scales: a null pointer");
  TW_CHECK(block >= 1 && out_features >= 1 && groups >= 1, "resolve_nested_scales: block is ", block,
           ", O is ", out_features, " and G is ", groups, ", need at least 1");
  tw::NestedScales call{};
  call.codes = pointer<const uint8_t>(codes);
  call.table = pointer<const float>(table);
  call.absmax = pointer<const float>(absmax);
  call.offset = offset;
  call.block = block;
  call.out_features = out_features;
  call.groups = groups;
  call.scales = pointer<float>(scales);
  call.device = device;
  call.stream = pointer<void>(stream);
  py::gil_scoped_release release;
  launched("resolve_nested_scales", tw::resolve_nested_scales(call));
}

}  // namespace

void register_cuda_linear(py::module_& m) {
  using py::arg;
  m.def("packed_linear", &packed_linear, py::kw_only(), arg("tokens"), arg("in_features"),
        arg("out_features"), arg("x"), arg("codes"), arg("scales"), arg("offsets"), arg("group_size"),
        arg("groups"), arg("values"), arg("bias"), arg("out_scale"), arg("hidden"), arg("up"), arg("rank"),
        arg("scale"), arg("y"), arg("partial"), arg("tile"), arg("sums"), arg("splits"), arg("device"),
        arg("stream"));
  m.def("resolve_nested_scales", &resolve_nested_scales, py::kw_only(), arg("codes"), arg("table"),
        arg("absmax"), arg("offset"), arg("block"), arg("out_features"), arg("groups"), arg("scales"),
        arg("device"), arg("stream"));
}
