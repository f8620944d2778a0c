// Hands a call to the kernels of the level in use.
#include "linear/linear.h"

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
bool few_tokens_and_delta(const LinearCall& call) {
  char* sums = take_workspace(call.tokens * call.out_features * static_cast<int64_t>(sizeof(float)));
  if (!sums) return false;
  LinearCall with_sums = call;
  with_sums.delta_sums = reinterpret_cast<const float*>(sums);
  const bool had_memory = sums_of_delta(call, reinterpret_cast<float*>(sums)) && few_tokens(with_sums);
  give_workspace(sums);
  return had_memory;
}

bool forward_of_one(const LinearCall& call) {
  if (are_few(call)) return call.delta.offsets ? few_tokens_and_delta(call) : few_tokens(call);
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
