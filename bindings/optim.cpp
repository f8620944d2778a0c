// tensors as pointers -> csrc/optim
#include "optim/optim.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "check.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// As kernels/optim/cpp_cpu.py numbers them.
tw::DType dtype_of(const char* op, int number) {
  TW_CHECK(0 <= number && number <= 2, op, ": dtype number ", number, ", need 0 to 2");
  return static_cast<tw::DType>(number);
}

// n, parameter, gradient, mean, square, mean codes, square codes, their scales, master, ages, step,
// places, key
constexpr size_t kItemFields = 14;

void adamw(int dtype, bool has_wide_gradient, bool has_wide_places, bool is_stochastic, double lr,
           double beta1, double beta2, double eps, double weight_decay, double scale,
           const std::vector<int64_t>& fields, int threads) {
  const char* op = "adamw_update";
  TW_CHECK(fields.size() % kItemFields == 0, op, ": ", fields.size(), " fields, need ", kItemFields,
           " an item");
  TW_CHECK(threads >= 1, op, ": threads is ", threads, ", need at least 1");
  TW_CHECK(0.0 <= beta1 && beta1 < 1.0 && 0.0 <= beta2 && beta2 < 1.0, op, ": betas are ", beta1, " and ",
           beta2, ", need 0 <= beta < 1");
  std::vector<tw::AdamwItem> items(fields.size() / kItemFields);
  for (size_t i = 0; i < items.size(); ++i) {
    const int64_t* f = &fields[i * kItemFields];
    tw::AdamwItem& item = items[i];
    item.n = f[0];
    item.parameter = pointer<void>(f[1]);
    item.gradient = pointer<const void>(f[2]);
    item.state = {pointer<float>(f[3]),   pointer<float>(f[4]), pointer<uint8_t>(f[5]),
                  pointer<uint8_t>(f[6]), pointer<float>(f[7]), pointer<float>(f[8])};
    item.master = pointer<float>(f[9]);
    item.ages = pointer<int32_t>(f[10]);
    item.step = pointer<float>(f[11]);
    item.places = pointer<const void>(f[12]);
    item.key = static_cast<uint32_t>(f[13]);
    TW_CHECK(item.n >= 0, op, ": tensor ", i, " has ", item.n, " entries");
    TW_CHECK(item.n == 0 || (item.parameter && item.gradient), op, ": null pointer to tensor ", i);
    const tw::AdamwState& s = item.state;
    const bool is_coded = s.mean_codes && s.square_codes && s.mean_scales && s.square_scales;
    TW_CHECK(item.n == 0 || (s.mean && s.square && !s.mean_codes) || (is_coded && !s.mean), op, ": tensor ",
             i, " needs two states, in floats or in codes with scales");
    TW_CHECK(item.n == 0 || !item.ages != !item.step, op, ": tensor ", i,
             " needs ages or a step, and not both");
    TW_CHECK(!is_stochastic || dtype_of(op, dtype) == tw::DType::bf16, op,
             ": rounding at random is for bfloat16");
  }
  tw::AdamwCall call = {};
  call.dtype = dtype_of(op, dtype);
  call.has_wide_gradient = has_wide_gradient && call.dtype != tw::DType::f32;
  call.has_wide_places = has_wide_places;
  call.narrow = is_stochastic ? tw::Narrow::stochastic : tw::Narrow::nearest;
  call.n_items = static_cast<int64_t>(items.size());
  call.items = items.data();
  call.lr = lr;
  call.beta1 = beta1;
  call.beta2 = beta2;
  call.eps = eps;
  call.weight_decay = weight_decay;
  call.scale = static_cast<float>(scale);
  call.threads = threads;
  py::gil_scoped_release release;
  if (!tw::adamw(call)) throw std::runtime_error("adamw_update: no memory for scratch");
}

// n and pointer of each gradient
double sum_of_squares(int dtype, const std::vector<int64_t>& fields, int threads) {
  const char* op = "gradient_norm";
  TW_CHECK(fields.size() % 2 == 0 && threads >= 1, op, ": ", fields.size(), " fields, ", threads,
           " threads; need 2 an item, and at least 1");
  std::vector<tw::Gradient> items(fields.size() / 2);
  for (size_t i = 0; i < items.size(); ++i) {
    items[i] = {pointer<const void>(fields[2 * i + 1]), fields[2 * i]};
    TW_CHECK(items[i].n == 0 || (items[i].n > 0 && items[i].data), op, ": null pointer to tensor ", i);
  }
  const tw::SquaresCall call = {dtype_of(op, dtype), static_cast<int64_t>(items.size()), items.data(),
                                threads};
  double sum = 0.0;
  py::gil_scoped_release release;
  if (!tw::sum_of_squares(call, &sum)) throw std::runtime_error("gradient_norm: no memory for scratch");
  return sum;
}

// parameter, gradient, row, column, row offsets, columns
void sm3(int dtype, bool has_wide_gradient, int64_t n_rows, int64_t n_columns, int64_t parameter,
         int64_t gradient, int64_t row, int64_t column, int64_t row_offsets, int64_t columns,
         bool has_short_columns, bool is_compact, double lr, double eps, double weight_decay, double scale,
         int threads) {
  const char* op = "sm3_update";
  TW_CHECK(n_rows >= 0 && n_columns >= 0 && threads >= 1, op, ": ", n_rows, " rows, ", n_columns,
           " columns, ", threads, " threads; need at least 0, 0 and 1");
  TW_CHECK(!row_offsets == !columns || n_columns == 0, op, ": row offsets need columns");
  tw::Sm3Call call = {};
  call.dtype = dtype_of(op, dtype);
  call.has_wide_gradient = has_wide_gradient && call.dtype != tw::DType::f32;
  call.n_rows = n_rows;
  call.n_columns = n_columns;
  call.parameter = pointer<void>(parameter);
  call.gradient = pointer<const void>(gradient);
  call.row = pointer<float>(row);
  call.column = pointer<float>(column);
  call.row_offsets = pointer<const int64_t>(row_offsets);
  call.columns = pointer<const void>(columns);
  call.has_short_columns = has_short_columns;
  call.is_compact = is_compact;
  call.lr = lr;
  call.eps = eps;
  call.weight_decay = weight_decay;
  call.scale = static_cast<float>(scale);
  call.threads = threads;
  if (n_rows == 0 || n_columns == 0) return;
  py::gil_scoped_release release;
  if (!tw::sm3(call)) throw std::runtime_error("sm3_update: no memory for scratch");
}

}  // namespace

void register_optim(py::module_& m) {
  m.def("adamw", &adamw);
  m.def("sm3", &sm3);
  m.def("sum_of_squares", &sum_of_squares);
}
