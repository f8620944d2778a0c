// tensors as (pointer, row stride) -> csrc/linear: checks what pointers cannot say.
#include "linear/linear.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "packed.h"
#include "recording.h"

namespace py = pybind11;

namespace {

// (data pointer, row stride in elements)
tw::Rows rows_of(const py::tuple& t) { return {pointer<void>(t[0]), t[1].cast<int64_t>()}; }

// (row_offsets, columns, columns are 16-bit, values, values are bfloat16)
tw::SparseDelta delta_of(const py::tuple& t) {
  return {pointer<const int64_t>(t[0]), pointer<const void>(t[1]), pointer<const void>(t[3]),
          t[2].cast<bool>(), t[4].cast<bool>()};
}

// dtype, (T, I, O, R), x, y, weight, packed or None, bias, out_scale, down, up, hidden,
// (scale, relu, row_adapters, column_adapters, column_scales, dropout_p, dropout_seed, input_order,
//  int8_activations, delta or None), threads
tw::LinearCall call_of(const std::string& dtype, const py::tuple& extents, const py::tuple& x,
                       const py::tuple& y, const py::tuple& weight, const py::object& packed, int64_t bias,
                       int64_t out_scale, const py::tuple& down, const py::tuple& up, const py::tuple& hidden,
                       const py::tuple& rule, int threads) {
  tw::LinearCall call = {};
  call.dtype = dtype_of("fused_linear", dtype);
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
  if (!packed.is_none()) call.packed = packed_of("fused_linear", packed.cast<py::tuple>(), call.in_features);
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
  if (!rule[9].is_none()) {
    const auto delta = rule[9].cast<py::tuple>();
    call.delta = delta_of(delta[0]);
    call.delta_x = rows_of(delta[1]);
    call.n_deltas = delta[2].cast<int>();
    TW_CHECK(call.delta.offsets, "fused_linear: null pointer to delta's row_offsets");
    TW_CHECK(call.n_deltas >= 0 && (call.n_deltas == 0 || call.row_adapters || call.tokens == 0),
             "fused_linear: ", call.n_deltas, " deltas without row_adapters");
  }
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

tw::LinearCall call_of(const py::tuple& t, int threads) {
  return call_of(t[0].cast<std::string>(), t[1], t[2], t[3], t[4], t[5], t[6].cast<int64_t>(),
                 t[7].cast<int64_t>(), t[8], t[9], t[10], t[11], threads);
}

// Of several layers: what the kernels take for granted.
void expect_one_x(const tw::LinearCall& first, const tw::LinearCall& call, size_t layers) {
  TW_CHECK(layers <= tw::kMostLayers, "fused_linear: ", layers, " layers, need at most ", tw::kMostLayers);
  TW_CHECK(call.x.data == first.x.data && call.x.row == first.x.row && call.tokens == first.tokens &&
               call.in_features == first.in_features && call.dtype == first.dtype,
           "fused_linear: layers over different x");
}

void make(const tw::LinearCall* calls, int n) {
  if (n == 0) return;
  struct Calls {
    tw::LinearCall list[tw::kMostLayers];
  } kept;
  std::copy(calls, calls + n, kept.list);
  tw::make_or_record([kept, n] { expect_memory(tw::linear_forward(kept.list, n)); });
}

// each layer: dtype, (T, I, O, R), x, y, weight, ... as call_of takes them
void forward(const std::vector<py::tuple>& layers, int threads) {
  tw::LinearCall calls[tw::kMostLayers];
  int n = 0;
  for (const py::tuple& layer : layers) {
    const tw::LinearCall call = call_of(layer, threads);
    expect_one_x(n == 0 ? call : calls[0], call, layers.size());
    if (call.tokens == 0 || call.out_features == 0) continue;
    calls[n++] = call;
  }
  make(calls, n);
}

// each layer: (dy, dx, (dbias, ddown, dup), its call as in the forward), 0 where a gradient is not wanted; dx
// is the first one's
void backward(const std::vector<py::tuple>& layers, int threads) {
  tw::LinearBackwardCall calls[tw::kMostLayers] = {};
  tw::LinearCall forwards[tw::kMostLayers];
  int n = 0;
  for (const py::tuple& layer : layers) {
    tw::LinearBackwardCall call = {};
    call.forward = call_of(layer[3].cast<py::tuple>(), threads);
    expect_one_x(n == 0 ? call.forward : forwards[0], call.forward, layers.size());
    const auto gradients = layer[2].cast<py::tuple>();
    call.dy = rows_of(layer[0]);
    call.dx = rows_of(layer[1]);
    call.dbias = pointer<float>(gradients[0]);
    call.ddown = pointer<float>(gradients[1]);
    call.dup = pointer<float>(gradients[2]);
    forwards[n] = call.forward;
    calls[n++] = call;
  }
  TW_CHECK(n >= 1 && tw::linear_fit_together(forwards, n),
           "fused_linear: gradients of layers of different kinds");
  py::gil_scoped_release release;
  expect_memory(tw::linear_backward(calls, n));
}

// A packed weight's call without a gradient or an update: all but x, bias and y is known beforehand.
class PreparedLinear {
 public:
  PreparedLinear(const std::string& dtype, int64_t n_in, int64_t n_out, const py::tuple& packed,
                 bool int8_activations) {
    const py::tuple none = py::make_tuple(0, 0);
    const py::tuple rule = py::make_tuple(1.0, false, 0, 0, 0, 0.0, 0, 0, int8_activations, py::none());
    call_ = call_of(dtype, py::make_tuple(0, n_in, n_out, 0), none, none, none, packed, 0, 0, none, none,
                    none, rule, 1);
  }

  // x (tokens, I) and y (tokens, O), rows without a gap
  void run(int64_t x, int64_t tokens, int64_t y, int64_t bias, int threads) const {
    const tw::LinearCall call = call_at(x, tokens, y, bias, threads);
    make(&call, tokens == 0 || call.out_features == 0 ? 0 : 1);
  }

  tw::LinearCall call_at(int64_t x, int64_t tokens, int64_t y, int64_t bias, int threads) const {
    TW_CHECK(tokens >= 0, "fused_linear: negative extent");
    TW_CHECK(threads >= 1, "fused_linear: threads is ", threads, ", need at least 1");
    tw::LinearCall call = call_;
    call.x = {reinterpret_cast<void*>(x), call.in_features};
    call.y = {reinterpret_cast<void*>(y), call.out_features};
    call.tokens = tokens;
    call.bias = reinterpret_cast<const float*>(bias);
    call.threads = threads;
    return call;
  }

 private:
  tw::LinearCall call_;
};

// Several over one x; a y and a bias for each.
void run_prepared(const std::vector<const PreparedLinear*>& layers, int64_t x, int64_t tokens,
                  const std::vector<int64_t>& ys, const std::vector<int64_t>& biases, int threads) {
  TW_CHECK(ys.size() == layers.size() && biases.size() == layers.size(), "fused_linear: ", layers.size(),
           " layers, ", ys.size(), " results, ", biases.size(), " biases");
  tw::LinearCall calls[tw::kMostLayers];
  int n = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const tw::LinearCall call = layers[i]->call_at(x, tokens, ys[i], biases[i], threads);
    expect_one_x(n == 0 ? call : calls[0], call, layers.size());
    if (tokens == 0 || call.out_features == 0) continue;
    calls[n++] = call;
  }
  make(calls, n);
}

void sampled(const std::string& dtype, const py::tuple& extents, const py::tuple& dy, const py::tuple& x,
             const py::tuple& at, int64_t products, int threads) {
  tw::SampledCall call = {};
  call.dtype = dtype_of("sampled_product", dtype);
  call.tokens = extents[0].cast<int64_t>();
  call.in_features = extents[1].cast<int64_t>();
  call.out_features = extents[2].cast<int64_t>();
  call.dy = rows_of(dy);
  call.x = rows_of(x);
  call.at = delta_of(at);
  call.products = reinterpret_cast<float*>(products);
  call.threads = threads;
  TW_CHECK(call.at.offsets, "sampled_product: null pointer to row_offsets");
  TW_CHECK(threads >= 1, "sampled_product: threads is ", threads, ", need at least 1");
  py::gil_scoped_release release;
  if (!tw::linear_sampled(call)) throw std::runtime_error("sampled_product: no memory for scratch");
}

}  // namespace

void register_linear(py::module_& m) {
  py::class_<PreparedLinear>(m, "PreparedLinear")
      .def(py::init<const std::string&, int64_t, int64_t, const py::tuple&, bool>())
      .def("__call__", &PreparedLinear::run);
  m.def("linear_prepared", &run_prepared);
  m.def("linear_forward", &forward);
  m.def("linear_backward", &backward);
  m.def("linear_sampled", &sampled);
}
