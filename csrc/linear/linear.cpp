// Hands a call to the kernels of the level in use.
#include "linear/linear.h"

#include "common/at_level.h"

namespace tw {

namespace {

// Up to so many tokens a packed weight is decoded in registers, once for all. A matrix unit is worth a panel
// from fewer on.
constexpr int64_t kFewTokens = 16, kFewInBytes = 32, kFewTokensOfDense = 4;
constexpr int64_t kFewBesideUnit = 4, kFewBesideUnitInOneByte = 8;

int64_t few_in_floats(const LinearCall& call) {
  if (call.weight.data) return kFewTokensOfDense;
  return isa_for(call.dtype) == Isa::amx ? kFewBesideUnit : kFewTokens;
}
int64_t few_as_bytes(const LinearCall& call) {
  if (isa_for(call.dtype) != Isa::amx) return kFewInBytes;
  return call.int8_activations ? kFewBesideUnitInOneByte : kFewBesideUnit;
}

bool few_tokens(const LinearCall& call) { TW_AT_LEVEL(isa_for(call.dtype), linear_rows, call) }
bool few_in_bytes(const LinearCall& call, bool* fits) {
  TW_AT_LEVEL(isa_for(call.dtype), linear_byte_rows, call, fits)
}
bool whole_numbers(const LinearCall& call, bool* fits) {
  TW_AT_LEVEL(isa_for(call.dtype), linear_int8, call, fits)
}
bool many_tokens(const LinearCall& call) { TW_AT_LEVEL(isa_for(call.dtype), linear_forward, call) }

}  // namespace

bool linear_forward(const LinearCall& call) {
  bool fits = false;
  if (!(call.dropout_p > 0)) {
    if (call.tokens <= few_as_bytes(call)) {
      const bool had_memory = few_in_bytes(call, &fits);
      if (fits) return had_memory;
    }
    if (call.tokens <= few_in_floats(call)) return few_tokens(call);
  }
  if (call.int8_activations) {
    const bool had_memory = whole_numbers(call, &fits);
    if (fits) return had_memory;
  }
  return many_tokens(call);
}
bool linear_backward(const LinearBackwardCall& call) {
  TW_AT_LEVEL(isa_for(call.forward.dtype), linear_backward, call)
}

}  // namespace tw
