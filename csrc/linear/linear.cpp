// Hands a call to the kernels of the level in use.
#include "linear/linear.h"

#include <string.h>

#include "common/at_level.h"
#include "common/extents.h"
#include "common/workspace.h"

namespace tw {

namespace {

// Up to so many tokens a weight is read once, packed lines decoded in registers. A matrix unit is worth a
// panel from fewer on.
constexpr int64_t kFewOfDense = 4, kFewInFloats = 16, kFewInBytes = 32;
constexpr int64_t kFewBesideUnit = 4, kFewBesideUnitInOneByte = 8;

// Whether few tokens are multiplied as bytes.
bool takes_bytes(const LinearCall& call) {
  return isa_for(call.dtype) >= Isa::avx512_bf16 && !call.weight.data && call.packed.kind != Codes::e4m3 &&
         (call.dtype == DType::bf16 || call.int8_activations);
}

bool are_few(const LinearCall& call) {
  if (call.dropout_p > 0) return false;
  if (call.weight.data) return call.tokens <= kFewOfDense;
  if (isa_for(call.dtype) == Isa::amx)
    return call.tokens <=
           (takes_bytes(call) && call.int8_activations ? kFewBesideUnitInOneByte : kFewBesideUnit);
  return call.tokens <= (takes_bytes(call) ? kFewInBytes : kFewInFloats);
}

bool rows_in_floats(const LinearCall& call) { TW_AT_LEVEL(isa_for(call.dtype), linear_rows, call) }
bool rows_in_bytes(const LinearCall& call) { TW_AT_LEVEL(isa_for(call.dtype), linear_byte_rows, call) }
bool sums_of_delta(const LinearCall& call, float* sums) {
  TW_AT_LEVEL(isa_for(call.dtype), linear_delta, call, sums)
}
bool whole_numbers(const LinearCall& call, bool* fits) {
  TW_AT_LEVEL(isa_for(call.dtype), linear_int8, call, fits)
}
bool many_tokens(const LinearCall* calls, int n_calls) {
  TW_AT_LEVEL(isa_for(calls->dtype), linear_forward, calls, n_calls)
}
bool many_gradients(const LinearBackwardCall* calls, int n_calls) {
  TW_AT_LEVEL(isa_for(calls->forward.dtype), linear_backward, calls, n_calls)
}

bool few_tokens(const LinearCall& call) {
  return takes_bytes(call) ? rows_in_bytes(call) : rows_in_floats(call);
}
bool forward_of_one(const LinearCall& call);

// D x of the rows of each adapter, `kRowsOfAdapter` of them at once.
constexpr int64_t kRowsOfAdapter = 16;  // lanes of one vector of the widest level, four of the narrowest
bool sums_of_adapters(const LinearCall& call, float* sums) {
  const int64_t row_bytes = call.in_features * (call.dtype == DType::f32 ? 4 : 2);
  const int64_t out_bytes = call.out_features * static_cast<int64_t>(sizeof(float));
  // one or two tokens of a call have their own kernel; how many share an adapter must not choose it
  const int64_t fewest = call.tokens > 2 ? 3 : 1;
  char* workspace = take_workspace(kRowsOfAdapter * (out_bytes + row_bytes));
  if (!workspace) return false;
  float* found = reinterpret_cast<float*>(workspace);
  char* rows = workspace + kRowsOfAdapter * out_bytes;
  memset(sums, 0, static_cast<size_t>(call.tokens * out_bytes));
  bool had_memory = true;
  for (int a = 0; a < call.n_deltas && had_memory; ++a) {
    LinearCall of_adapter = call;
    of_adapter.delta.offsets += a * call.out_features;
    of_adapter.delta_x = {rows, call.in_features};
    int64_t at[kRowsOfAdapter], n = 0;
    for (int64_t t = 0; t <= call.tokens && had_memory; ++t) {
      if (t < call.tokens && call.row_adapters[t] == a) {
        const char* from = static_cast<const char*>(call.delta_x.data);
        const int64_t row = call.in_features ? row_bytes / call.in_features * call.delta_x.row : 0;
        memcpy(rows + n * row_bytes, from + t * row, static_cast<size_t>(row_bytes));
        at[n++] = t;
      }
      if (n == 0 || (n < kRowsOfAdapter && t < call.tokens)) continue;
      for (of_adapter.tokens = n; of_adapter.tokens < fewest; ++of_adapter.tokens)
        memset(rows + of_adapter.tokens * row_bytes, 0, static_cast<size_t>(row_bytes));
      had_memory = sums_of_delta(of_adapter, found);
      for (int64_t i = 0; i < n; ++i)
        memcpy(sums + at[i] * call.out_features, found + i * call.out_features,
               static_cast<size_t>(out_bytes));
      n = 0;
    }
  }
  give_workspace(workspace);
  return had_memory;
}

// The call once the sums of D x are there.
bool with_sums_of_delta(const LinearCall& call) {
  char* sums = take_workspace(call.tokens * call.out_features * static_cast<int64_t>(sizeof(float)));
  if (!sums) return false;
  LinearCall with_sums = call;
  with_sums.delta_sums = reinterpret_cast<const float*>(sums);
  with_sums.delta.offsets = nullptr;
  with_sums.n_deltas = 0;
  float* to = reinterpret_cast<float*>(sums);
  const bool had_memory =
      (call.n_deltas > 0 ? sums_of_adapters(call, to) : sums_of_delta(call, to)) && forward_of_one(with_sums);
  give_workspace(sums);
  return had_memory;
}

bool forward_of_one(const LinearCall& call) {
  if (call.delta.offsets && (call.n_deltas > 0 || are_few(call))) return with_sums_of_delta(call);
  if (are_few(call)) return few_tokens(call);
  if (call.int8_activations) {
    bool fits = false;
    const bool had_memory = whole_numbers(call, &fits);
    if (fits) return had_memory;
  }
  return many_tokens(&call, 1);
}

// Whether two layers can be multiplied side by side, panel by panel.
bool fit_together(const LinearCall& a, const LinearCall& b) {
  const bool same_kind =
      a.weight.data ? b.weight.data != nullptr : !b.weight.data && a.packed.kind == b.packed.kind;
  return same_kind && !a.input_order && !b.input_order && !a.int8_activations && !b.int8_activations;
}

}  // namespace

bool linear_forward(const LinearCall* calls, int n_calls) {
  bool together = true;
  for (int i = 0; i < n_calls; ++i)
    together = together && !are_few(calls[i]) && fit_together(calls[0], calls[i]);
  if (together && n_calls > 1) return many_tokens(calls, n_calls);
  for (int i = 0; i < n_calls; ++i)
    if (!forward_of_one(calls[i])) return false;
  return true;
}

bool linear_backward(const LinearBackwardCall* calls, int n_calls) { return many_gradients(calls, n_calls); }

bool linear_fit_together(const LinearCall* calls, int n_calls) {
  for (int i = 1; i < n_calls; ++i)
    if (!fit_together(calls[0], calls[i])) return false;
  return true;
}

bool linear_sampled(const SampledCall& call) { TW_AT_LEVEL(isa_for(call.dtype), linear_sampled, call) }

}  // namespace tw
