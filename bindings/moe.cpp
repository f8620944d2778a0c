// tensors as (pointer, strides) -> csrc/moe: checks what pointers cannot say.
#include "moe/moe.h"

#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "packed.h"

namespace py = pybind11;

namespace {

// silu and its like have no ups: gates alone
void set_activation(tw::MoeCall& call, const std::string& name, bool alternating) {
  static const std::pair<const char*, tw::Gate> kGated[] = {{"swiglu", tw::Gate::swiglu},
                                                            {"geglu", tw::Gate::geglu},
                                                            {"geglu_tanh", tw::Gate::geglu_tanh},
                                                            {"clamped_swiglu", tw::Gate::clamped_swiglu},
                                                            {"reglu", tw::Gate::reglu}};
  static const std::pair<const char*, tw::Gate> kAlone[] = {{"silu", tw::Gate::swiglu},
                                                            {"gelu", tw::Gate::geglu},
                                                            {"gelu_tanh", tw::Gate::geglu_tanh},
                                                            {"relu", tw::Gate::reglu}};
  for (const auto& [known, gate] : kGated)
    if (name == known) {
      call.gate = gate;
      call.layout = alternating ? tw::Layout::alternating : tw::Layout::halves;
      return;
    }
  for (const auto& [known, gate] : kAlone)
    if (name == known && !alternating) {
      call.gate = gate;
      call.layout = tw::Layout::alone;
      return;
    }
  tw::fail_check("moe_mlp: activation ", name, alternating ? " interleaved" : "",
                 ", which is not known here");
}

tw::Rows rows_of(const py::tuple& t) { return {pointer<void>(t[0]), t[1].cast<int64_t>()}; }

// (data pointer, stride between experts, row stride), or a packed weight's tuple
tw::ExpertWeight weight_of(const py::tuple& t, int64_t n_in, bool is_packed) {
  tw::ExpertWeight w = {};
  if (is_packed)
    w.packed = packed_of("moe_mlp", t, n_in);
  else
    w = {{pointer<void>(t[0]), t[2].cast<int64_t>()}, t[1].cast<int64_t>(), {}};
  return w;
}

// dtype, (T, K, E, H, I), (activation, alpha, limit, interleaved, transposed, scale_input), x, gates, order,
// starts, up, down, is_packed, up_bias, down_bias, z_update, z, threads
tw::MoeCall call_of(const std::string& dtype, const py::tuple& extents, const py::tuple& rule,
                    const py::tuple& x, int64_t gates, int64_t order, int64_t starts, const py::tuple& up,
                    const py::tuple& down, bool is_packed, int64_t up_bias, int64_t down_bias,
                    int64_t z_update, int64_t z, int threads) {
  tw::MoeCall call = {};
  call.dtype = dtype_of("moe_mlp", dtype);
  call.tokens = extents[0].cast<int64_t>();
  call.slots = extents[1].cast<int64_t>();
  call.experts = extents[2].cast<int64_t>();
  call.features = extents[3].cast<int64_t>();
  call.width = extents[4].cast<int64_t>();
  TW_CHECK(call.tokens >= 0 && call.slots >= 0 && call.experts >= 0 && call.features >= 0 && call.width >= 0,
           "moe_mlp: negative extent");
  TW_CHECK(threads >= 1, "moe_mlp: threads is ", threads, ", need at least 1");
  set_activation(call, rule[0].cast<std::string>(), rule[3].cast<bool>());
  call.alpha = rule[1].cast<float>();
  call.limit = rule[2].cast<float>();
  call.transposed = rule[4].cast<bool>();
  call.scale_input = rule[5].cast<bool>();
  call.x = rows_of(x);
  call.gates = reinterpret_cast<const float*>(gates);
  call.order = reinterpret_cast<const int32_t*>(order);
  call.starts = reinterpret_cast<const int64_t*>(starts);
  call.up = weight_of(up, call.features, is_packed);
  call.down = weight_of(down, call.width, is_packed);
  call.up_bias = reinterpret_cast<const float*>(up_bias);
  call.down_bias = reinterpret_cast<const float*>(down_bias);
  call.z_update = reinterpret_cast<const void*>(z_update);
  call.z = reinterpret_cast<void*>(z);
  call.threads = threads;
  // what order and starts say is followed without looking
  const int64_t slots = call.tokens * call.slots;
  TW_CHECK(call.starts && call.starts[0] == 0 && call.starts[call.experts] <= slots,
           "moe_mlp: starts do not begin with 0 or end past ", slots, " slots");
  for (int64_t e = 0; e < call.experts; ++e)
    TW_CHECK(call.starts[e] <= call.starts[e + 1], "moe_mlp: starts[", e, "] is ", call.starts[e],
             ", which is more than the next");
  for (int64_t r = 0; r < slots; ++r)
    TW_CHECK(call.order[r] >= 0 && call.order[r] < slots, "moe_mlp: order[", r, "] is ", call.order[r],
             ", need 0 to ", slots - 1);
  return call;
}

void expect_memory(bool had) {
  if (!had) throw std::runtime_error("moe_mlp: no memory for scratch");
}

void forward(const py::tuple& y, const std::string& dtype, const py::tuple& extents, const py::tuple& rule,
             const py::tuple& x, int64_t gates, int64_t order, int64_t starts, const py::tuple& up,
             const py::tuple& down, bool is_packed, int64_t up_bias, int64_t down_bias, int64_t z_update,
             int64_t z, int threads) {
  tw::MoeCall call = call_of(dtype, extents, rule, x, gates, order, starts, up, down, is_packed, up_bias,
                             down_bias, z_update, z, threads);
  call.y = rows_of(y);
  py::gil_scoped_release release;
  expect_memory(tw::moe_forward(call));
}

// gradients: dgates, dup, ddown, dup_bias, ddown_bias, 0 where not wanted; da_update and dz may be 0
void backward(const py::tuple& dy, const py::tuple& dx, const py::tuple& gradients, int64_t da_update,
              int64_t dz, const std::string& dtype, const py::tuple& extents, const py::tuple& rule,
              const py::tuple& x, int64_t gates, int64_t order, int64_t starts, const py::tuple& up,
              const py::tuple& down, bool is_packed, int64_t up_bias, int64_t down_bias, int64_t z_update,
              int64_t z, int threads) {
  tw::MoeBackwardCall call = {};
  call.forward = call_of(dtype, extents, rule, x, gates, order, starts, up, down, is_packed, up_bias,
                         down_bias, z_update, z, threads);
  call.dy = rows_of(dy);
  call.dx = rows_of(dx);
  call.dgates = pointer<float>(gradients[0]);
  call.dup = pointer<void>(gradients[1]);
  call.ddown = pointer<void>(gradients[2]);
  call.dup_bias = pointer<float>(gradients[3]);
  call.ddown_bias = pointer<float>(gradients[4]);
  call.da_update = reinterpret_cast<const void*>(da_update);
  call.dz = reinterpret_cast<void*>(dz);
  py::gil_scoped_release release;
  expect_memory(tw::moe_backward(call));
}

// starts, and index if there is one, are followed without looking
void check_rows(const char* name, int64_t experts, const int64_t* starts, int64_t n_rows, int64_t n_from,
                const int32_t* index) {
  TW_CHECK(starts && starts[0] == 0 && starts[experts] <= n_rows, name,
           ": starts do not begin with 0 or end past ", n_rows, " rows");
  for (int64_t e = 0; e < experts; ++e)
    TW_CHECK(starts[e] <= starts[e + 1], name, ": starts[", e, "] is ", starts[e],
             ", which is more than the next");
  TW_CHECK(index || starts[experts] <= n_from, name, ": ", starts[experts], " rows of ", n_from);
  for (int64_t r = 0; index && r < starts[experts]; ++r)
    TW_CHECK(index[r] >= 0 && index[r] < n_from, name, ": index[", r, "] is ", index[r], ", need 0 to ",
             n_from - 1);
}

// (pointer, row stride, number of rows, index or 0), checked
tw::IndexedRows indexed_rows_of(const char* name, const py::tuple& t, int64_t experts, const int64_t* starts,
                                int64_t n_rows) {
  const tw::IndexedRows from = {rows_of(t), pointer<int32_t>(t[3])};
  check_rows(name, experts, starts, n_rows, t[2].cast<int64_t>(), from.index);
  return from;
}

// dtype, (E, n_out, n_in, rows), starts, from, weight (pointer, expert stride, row stride), transposed, to
void grouped(const std::string& dtype, const py::tuple& extents, int64_t starts, const py::tuple& from,
             const py::tuple& weight, bool transposed, const py::tuple& to, int threads) {
  const char* name = "moe_grouped";
  tw::GroupedCall call = {};
  call.dtype = dtype_of(name, dtype);
  call.experts = extents[0].cast<int64_t>();
  call.n_out = extents[1].cast<int64_t>();
  call.n_in = extents[2].cast<int64_t>();
  TW_CHECK(call.experts >= 0 && call.n_out >= 0 && call.n_in >= 0, name, ": negative extent");
  TW_CHECK(threads >= 1, name, ": threads is ", threads, ", need at least 1");
  call.starts = reinterpret_cast<const int64_t*>(starts);
  call.from = indexed_rows_of(name, from, call.experts, call.starts, extents[3].cast<int64_t>());
  call.weight = {pointer<void>(weight[0]), weight[2].cast<int64_t>()};
  call.weight_expert = weight[1].cast<int64_t>();
  call.transposed = transposed;
  call.to = rows_of(to);
  call.threads = threads;
  py::gil_scoped_release release;
  expect_memory(tw::moe_grouped(call));
}

// dtype, (E, n_left, n_right, rows), starts, left, right, to
void outer(const std::string& dtype, const py::tuple& extents, int64_t starts, const py::tuple& left,
           const py::tuple& right, int64_t to, int threads) {
  const char* name = "moe_outer";
  tw::OuterCall call = {};
  call.dtype = dtype_of(name, dtype);
  call.experts = extents[0].cast<int64_t>();
  call.n_left = extents[1].cast<int64_t>();
  call.n_right = extents[2].cast<int64_t>();
  TW_CHECK(call.experts >= 0 && call.n_left >= 0 && call.n_right >= 0, name, ": negative extent");
  TW_CHECK(threads >= 1, name, ": threads is ", threads, ", need at least 1");
  call.starts = reinterpret_cast<const int64_t*>(starts);
  call.left = indexed_rows_of(name, left, call.experts, call.starts, extents[3].cast<int64_t>());
  call.right = indexed_rows_of(name, right, call.experts, call.starts, extents[3].cast<int64_t>());
  call.to = reinterpret_cast<void*>(to);
  call.threads = threads;
  py::gil_scoped_release release;
  expect_memory(tw::moe_outer(call));
}

}  // namespace

void register_moe(py::module_& m) {
  m.def("moe_forward", &forward);
  m.def("moe_backward", &backward);
  m.def("moe_grouped", &grouped);
  m.def("moe_outer", &outer);
}
