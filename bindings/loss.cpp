// tensors as pointers -> csrc/loss
#include "loss/loss.h"

#include <pybind11/pybind11.h>

#include "check.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

void head_rows(int dtype, int64_t n_rows, int64_t n_classes, int64_t n_ids, int64_t logits, int64_t row,
               int64_t bias, int64_t class_weight, float class_weight_sum, float scale, float cap,
               int64_t ids, bool has_stats, int64_t largest, int64_t mass, int64_t log_probs, int64_t total,
               bool wants_gradient, int64_t at_ids, int64_t for_ids, int64_t for_total, int64_t for_lse,
               int64_t for_square, int threads) {
  TW_CHECK(0 <= dtype && dtype <= 2, "head_rows: dtype number ", dtype, ", need 0 to 2");
  TW_CHECK(n_rows >= 0 && n_classes >= 1 && n_ids >= 0 && row >= n_classes && threads >= 1,
           "head_rows: ", n_rows, " rows of ", n_classes, " classes, ", row, " apart, with ", n_ids,
           " ids on ", threads, " threads; need at least 0, 1, the classes, 0 and 1");
  TW_CHECK(n_rows == 0 || (logits && largest && mass), "head_rows: null pointer to ", n_rows, " rows");
  TW_CHECK(n_rows * n_ids == 0 || (ids && log_probs), "head_rows: null pointer to the ids of ", n_rows,
           " rows");
  TW_CHECK(!wants_gradient || n_rows * n_ids == 0 || (at_ids && for_ids),
           "head_rows: a gradient needs what comes in for the ids");
  tw::HeadRowsCall call = {};
  call.dtype = static_cast<tw::DType>(dtype);
  call.n_rows = n_rows;
  call.n_classes = n_classes;
  call.n_ids = n_ids;
  call.logits = {pointer<void>(logits), row};
  call.bias = pointer<const float>(bias);
  call.class_weight = pointer<const float>(class_weight);
  call.class_weight_sum = class_weight_sum;
  call.scale = scale;
  call.cap = cap;
  call.ids = pointer<const int64_t>(ids);
  call.has_stats = has_stats;
  call.largest = pointer<float>(largest);
  call.mass = pointer<float>(mass);
  call.log_probs = pointer<float>(log_probs);
  call.total = pointer<float>(total);
  call.wants_gradient = wants_gradient;
  call.at_ids = pointer<float>(at_ids);
  call.for_ids = pointer<const float>(for_ids);
  call.for_total = pointer<const float>(for_total);
  call.for_lse = pointer<const float>(for_lse);
  call.for_square = pointer<const float>(for_square);
  call.threads = threads;
  for (int64_t i = 0; i < n_rows * n_ids; ++i)
    TW_CHECK(call.ids[i] < n_classes, "head_rows: id ", call.ids[i], " of row ", i / n_ids, ", need below ",
             n_classes);
  py::gil_scoped_release release;
  tw::head_rows(call);
}

}  // namespace

void register_loss(py::module_& m) { m.def("head_rows", &head_rows); }
