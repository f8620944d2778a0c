// tensors as pointers -> csrc/norm
#include "norm/norm.h"

#include <pybind11/pybind11.h>

#include <string>

#include "check.h"
#include "recording.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// As kernels/norm/cpp_cpu.py numbers them.
tw::DType dtype_of(int number) {
  TW_CHECK(0 <= number && number <= 2, "norm: dtype number ", number, ", need 0 to 2");
  return static_cast<tw::DType>(number);
}

tw::Rows rows(int64_t address, int64_t row) { return {pointer<void>(address), row}; }

void expect_memory(bool had, const char* what) {
  if (!had) throw std::runtime_error(std::string(what) + ": no memory for scratch");
}

void check_call(const char* name, int64_t n_rows, int64_t width, int threads) {
  TW_CHECK(n_rows >= 0 && width >= 1 && threads >= 1, name, ": ", n_rows, " rows of ", width, " elements on ",
           threads, " threads; need at least 0, 1 and 1");
}

tw::NormCall norm_call(int dtype, bool has_wide_weight, bool has_wide_y, int64_t n_rows, int64_t width,
                       int64_t x, int64_t x_row, int64_t weight, int64_t bias, float offset, float eps,
                       int64_t y, int64_t y_row, int64_t rstd, int64_t mean, bool is_centred,
                       bool rounds_early, int threads) {
  check_call("norm", n_rows, width, threads);
  TW_CHECK(n_rows == 0 || (x && y), "norm: null pointer to ", n_rows, " rows");
  TW_CHECK(!has_wide_y || has_wide_weight, "norm: a wide result needs a wide weight");
  tw::NormCall call = {};
  call.dtype = dtype_of(dtype);
  call.has_wide_weight = has_wide_weight;
  call.has_wide_y = has_wide_y;
  call.is_centred = is_centred;
  call.rounds_early = rounds_early;
  call.n_rows = n_rows;
  call.width = width;
  call.x = rows(x, x_row);
  call.weight = pointer<const void>(weight);
  call.bias = pointer<const void>(bias);
  call.offset = offset;
  call.eps = eps;
  call.y = rows(y, y_row);
  call.rstd = pointer<float>(rstd);
  call.mean = pointer<float>(mean);
  call.threads = threads;
  return call;
}

void norm_forward(int dtype, bool has_wide_weight, bool has_wide_y, int64_t n_rows, int64_t width, int64_t x,
                  int64_t x_row, int64_t weight, int64_t bias, float offset, float eps, int64_t y,
                  int64_t rstd, int64_t mean, bool is_centred, bool rounds_early, int64_t residual,
                  int64_t residual_row, int64_t sum, int threads) {
  tw::NormCall call = norm_call(dtype, has_wide_weight, has_wide_y, n_rows, width, x, x_row, weight, bias,
                                offset, eps, y, width, rstd, mean, is_centred, rounds_early, threads);
  call.residual = rows(residual, residual_row);
  call.sum = rows(sum, width);
  TW_CHECK(!residual == !sum, "norm: a residual needs a place for the sum");
  tw::make_or_record([call] { tw::norm_forward(call); });
}

void norm_backward(int dtype, bool has_wide_weight, bool has_wide_y, int64_t n_rows, int64_t width, int64_t x,
                   int64_t x_row, int64_t weight, float offset, int64_t dy, int64_t dy_row, int64_t rstd,
                   int64_t mean, bool is_centred, int64_t dsum, int64_t dsum_row, int64_t dx, int64_t dweight,
                   int64_t dbias, int threads) {
  tw::NormBackwardCall call = {};
  call.forward = norm_call(dtype, has_wide_weight, has_wide_y, n_rows, width, x, x_row, weight, 0, offset,
                           0.0f, dy, dy_row, rstd, mean, is_centred, false, threads);
  TW_CHECK(n_rows == 0 || (rstd && (mean || !is_centred)), "norm: the backward needs what the forward saved");
  call.dsum = rows(dsum, dsum_row);
  call.dx = rows(dx, width);
  call.dweight = pointer<float>(dweight);
  call.dbias = pointer<float>(dbias);
  py::gil_scoped_release release;
  expect_memory(tw::norm_backward(call), "norm_backward");
}

void rope(int dtype, bool has_wide_tables, bool is_interleaved, bool is_inverse, int64_t batch,
          int64_t length, int64_t n_heads, int64_t head_dim, int64_t n_angles, int64_t x, int64_t x_batch,
          int64_t x_token, int64_t x_head, int64_t y, int64_t y_batch, int64_t y_token, int64_t y_head,
          int64_t cos, int64_t sin, int64_t table_batch, int64_t table_row, int64_t positions,
          int64_t n_positions, int threads) {
  check_call("rope", batch * length * n_heads, head_dim, threads);
  TW_CHECK(n_angles >= 0 && 2 * n_angles <= head_dim, "rope: ", n_angles, " angles for heads of ", head_dim);
  tw::RopeCall call = {};
  call.dtype = dtype_of(dtype);
  call.has_wide_tables = has_wide_tables;
  call.is_interleaved = is_interleaved;
  call.is_inverse = is_inverse;
  call.batch = batch;
  call.length = length;
  call.n_heads = n_heads;
  call.head_dim = head_dim;
  call.n_angles = n_angles;
  call.x = {pointer<void>(x), x_batch, x_token, x_head};
  call.y = {pointer<void>(y), y_batch, y_token, y_head};
  call.cos = pointer<const void>(cos);
  call.sin = pointer<const void>(sin);
  call.table_batch = table_batch;
  call.table_row = table_row;
  call.positions = pointer<const int64_t>(positions);
  call.threads = threads;
  if (positions) {
    const int64_t stray = tw::first_stray(call.positions, batch * length, n_positions);
    TW_CHECK(stray < 0, "rope: positions[", stray / length, ", ", stray % length, "] is ",
             call.positions[stray], ", need 0 to ", n_positions - 1, ", the rows of cos");
  }
  tw::make_or_record([call] { tw::rope(call); });
}

tw::GatedCall gated_call(int dtype, int activation, int64_t n_rows, int64_t width, int64_t gate,
                         int64_t gate_row, int64_t up, int64_t up_row, int64_t y, int64_t y_row,
                         int threads) {
  check_call("gated activation", n_rows, width, threads);
  TW_CHECK(0 <= activation && activation <= 2, "gated activation: number ", activation, ", need 0 to 2");
  TW_CHECK(n_rows == 0 || (gate && up && y), "gated activation: null pointer to ", n_rows, " rows");
  tw::GatedCall call = {};
  call.dtype = dtype_of(dtype);
  call.activation = static_cast<tw::Activation>(activation);
  call.n_rows = n_rows;
  call.width = width;
  call.gate = rows(gate, gate_row);
  call.up = rows(up, up_row);
  call.y = rows(y, y_row);
  call.threads = threads;
  return call;
}

void gated_forward(int dtype, int activation, int64_t n_rows, int64_t width, int64_t gate, int64_t gate_row,
                   int64_t up, int64_t up_row, int64_t y, int threads) {
  const tw::GatedCall call =
      gated_call(dtype, activation, n_rows, width, gate, gate_row, up, up_row, y, width, threads);
  tw::make_or_record([call] { tw::gated_forward(call); });
}

void gated_backward(int dtype, int activation, int64_t n_rows, int64_t width, int64_t gate, int64_t gate_row,
                    int64_t up, int64_t up_row, int64_t dy, int64_t dy_row, int64_t dgate, int64_t dup,
                    int64_t d_row, int threads) {
  tw::GatedCall call =
      gated_call(dtype, activation, n_rows, width, gate, gate_row, up, up_row, dy, dy_row, threads);
  call.dgate = rows(dgate, d_row);
  call.dup = rows(dup, d_row);
  py::gil_scoped_release release;
  tw::gated_backward(call);
}

void check_ids(const int64_t* ids, int64_t n_ids, int64_t n_rows) {
  const int64_t stray = tw::first_stray(ids, n_ids, n_rows);
  TW_CHECK(stray < 0, "embedding: ids[", stray, "], flattened, is ", ids[stray], ", need 0 to ", n_rows - 1,
           ", the rows of weight");
}

void embedding_forward(int64_t ids, int64_t n_ids, int64_t weight, int64_t n_rows, int64_t row_bytes,
                       int64_t weight_row, int64_t y, int threads) {
  const tw::EmbeddingCall call = {
      n_ids,      n_rows,           row_bytes, pointer<const int64_t>(ids), pointer<const void>(weight),
      weight_row, pointer<void>(y), threads};
  check_call("embedding", n_ids, row_bytes, threads);
  check_ids(call.ids, n_ids, n_rows);
  py::gil_scoped_release release;
  tw::embedding_forward(call);
}

void embedding_backward(int dtype, int64_t ids, int64_t n_ids, int64_t n_rows, int64_t width,
                        int64_t padding_row, bool by_frequency, int64_t dy, int64_t dy_row, int64_t dweight,
                        int threads) {
  tw::EmbeddingBackwardCall call = {};
  call.dtype = dtype_of(dtype);
  call.n_ids = n_ids;
  call.n_rows = n_rows;
  call.width = width;
  call.ids = pointer<const int64_t>(ids);
  call.padding_row = padding_row;
  call.by_frequency = by_frequency;
  call.dy = rows(dy, dy_row);
  call.dweight = pointer<void>(dweight);
  call.threads = threads;
  check_call("embedding_backward", n_ids, width, threads);
  check_ids(call.ids, n_ids, n_rows);
  py::gil_scoped_release release;
  expect_memory(tw::embedding_backward(call), "embedding_backward");
}

}  // namespace

void register_norm(py::module_& m) {
  m.def("norm_forward", &norm_forward);
  m.def("norm_backward", &norm_backward);
  m.def("rope", &rope);
  m.def("gated_forward", &gated_forward);
  m.def("gated_backward", &gated_backward);
  m.def("embedding_forward", &embedding_forward);
  m.def("embedding_backward", &embedding_backward);
}
