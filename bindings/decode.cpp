// tensors as pointers -> csrc/decode
#include "decode/decode.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "check.h"

namespace py = pybind11;

namespace {

using Matrix = std::pair<int64_t, int64_t>;  // address, way from row to row in elements

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

tw::Rows rows_of(const char* op, const char* name, const Matrix& m, int64_t n_rows) {
  TW_CHECK(m.first || n_rows == 0, op, ": null pointer to ", name);
  return {pointer<void>(m.first), m.second};
}

void expect_extents(const char* op, int dtype, int64_t n_rows, int64_t vocabulary, int threads) {
  TW_CHECK(0 <= dtype && dtype <= 2, op, ": dtype number ", dtype, ", need 0 to 2");
  TW_CHECK(n_rows >= 0 && 1 <= vocabulary && vocabulary < int64_t{1} << 31, op, ": ", n_rows, " rows of ",
           vocabulary, " tokens, need at least 0 of 1 to 2^31 - 1");
  TW_CHECK(threads >= 1, op, ": threads is ", threads, ", need at least 1");
}

void expect_ids(const char* name, const int64_t* ids, int64_t n_rows, int64_t n, int64_t vocabulary) {
  for (int64_t i = 0; i < n_rows * n; ++i)
    TW_CHECK(ids[i] < vocabulary, "sample_tokens: ", name, "[", i / n, ", ", i % n, "] is ", ids[i],
             ", need less than V = ", vocabulary);
}

// prompt and output: address and ids a row
void sample(int dtype, int64_t n_rows, int64_t vocabulary, const Matrix& logits, int64_t rules,
            int64_t choices, const Matrix& prompt, const Matrix& output, int64_t tokens, int64_t logprobs,
            int threads) {
  const char* op = "sample_tokens";
  expect_extents(op, dtype, n_rows, vocabulary, threads);
  if (n_rows == 0) return;
  TW_CHECK(rules && choices && tokens, op, ": null pointer to rules, choices or tokens");
  TW_CHECK((prompt.first || prompt.second == 0) && (output.first || output.second == 0), op,
           ": null pointer to prompt or output");
  tw::SampleCall call = {};
  call.dtype = static_cast<tw::DType>(dtype);
  call.n_rows = n_rows;
  call.vocabulary = vocabulary;
  call.logits = rows_of(op, "logits", logits, n_rows);
  call.rules = pointer<const tw::SampleRule>(rules);
  call.choices = pointer<const tw::SampleChoice>(choices);
  call.prompt = pointer<const int64_t>(prompt.first);
  call.output = pointer<const int64_t>(output.first);
  call.n_prompt = prompt.second;
  call.n_output = output.second;
  call.tokens = pointer<int64_t>(tokens);
  call.logprobs = pointer<float>(logprobs);
  call.threads = threads;
  py::gil_scoped_release release;
  expect_ids("prompt", call.prompt, n_rows, call.n_prompt, vocabulary);
  expect_ids("output", call.output, n_rows, call.n_output, vocabulary);
  if (!tw::sample_tokens(call)) throw std::runtime_error("sample_tokens: no memory for scratch");
}

void tilt(int dtype, int64_t n_rows, int64_t vocabulary, const Matrix& large,
          const std::vector<Matrix>& tuned, const Matrix& base, int64_t a, int64_t sums, int threads) {
  const char* op = "fuse_logits";
  expect_extents(op, dtype, n_rows, vocabulary, threads);
  if (n_rows == 0) return;
  TW_CHECK(a && sums, op, ": null pointer to strengths or sums");
  std::vector<tw::Rows> experts;
  for (const Matrix& expert : tuned) experts.push_back(rows_of(op, "tuned", expert, n_rows));
  tw::TiltCall call = {};
  call.dtype = static_cast<tw::DType>(dtype);
  call.n_rows = n_rows;
  call.vocabulary = vocabulary;
  call.n_experts = static_cast<int64_t>(experts.size());
  call.large = rows_of(op, "large", large, n_rows);
  call.base = rows_of(op, "base", base, n_rows);
  call.tuned = experts.data();
  call.a = pointer<const double>(a);
  call.sums = pointer<double>(sums);
  call.threads = threads;
  py::gil_scoped_release release;
  tw::tilt(call);
}

}  // namespace

void register_decode(py::module_& m) {
  m.def("sample_tokens", &sample);
  m.def("tilt", &tilt);
}
