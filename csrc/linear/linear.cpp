// Hands a call to the kernels of the level in use.
#include "linear/linear.h"

#include "common/at_level.h"

namespace tw {

namespace {

// Up to so many tokens a packed weight is decoded in registers, once for all. A matrix unit is worth a panel
// from fewer on.
constexpr int64_t kFewTokens = 16, kFewTokensBesideUnit = 4, kFewTokensOfDense = 4;

bool few_tokens(const LinearCall& call) { TW_AT_LEVEL(isa_for(call.dtype), linear_rows, call) }
bool whole_numbers(const LinearCall& call, bool* fits) {
  TW_AT_LEVEL(isa_for(call.dtype), linear_int8, call, fits)
}
bool many_tokens(const LinearCall& call) { TW_AT_LEVEL(isa_for(call.dtype), linear_forward, call) }

}  // namespace

bool linear_forward(const LinearCall& call) {
  int64_t few = isa_for(call.dtype) == Isa::amx ? kFewTokensBesideUnit : kFewTokens;
  if (call.weight.data) few = kFewTokensOfDense;
  if (call.tokens <= few && !(call.dropout_p > 0)) return few_tokens(call);
  if (call.int8_activations) {
    bool fits = false;
    const bool had_memory = whole_numbers(call, &fits);
    if (fits) return had_memory;
  }
  return many_tokens(call);
}
bool linear_backward(const LinearBackwardCall& call) {
  TW_AT_LEVEL(isa_for(call.forward.dtype), linear_backward, call)
}

}  // namespace tw
