// Hands a call to the kernels of the level in use.
#include "linear/linear.h"

#include "common/isa.h"

namespace tw {

namespace {

// Up to so many tokens a packed weight is decoded in registers, once for all. A matrix unit is worth a panel
// from fewer on.
constexpr int64_t kFewTokens = 16, kFewTokensBesideUnit = 4, kFewTokensOfDense = 4;

// The matrix unit multiplies bf16: everything else runs one level below.
Isa isa_for(DType dtype) {
  const Isa isa = current_isa();
  return isa == Isa::amx && dtype != DType::bf16 ? Isa::avx512_bf16 : isa;
}

}  // namespace

#if defined(TW_BUILT_X86_LEVELS)
#define TW_AT_LEVEL(dtype, function, ...)        \
  switch (isa_for(dtype)) {                      \
    case Isa::amx:                               \
      return amx::function(__VA_ARGS__);         \
    case Isa::avx512_bf16:                       \
      return avx512_bf16::function(__VA_ARGS__); \
    case Isa::avx512:                            \
      return avx512::function(__VA_ARGS__);      \
    case Isa::avx2:                              \
      return avx2::function(__VA_ARGS__);        \
    default:                                     \
      return portable::function(__VA_ARGS__);    \
  }
#else
#define TW_AT_LEVEL(dtype, function, ...) return portable::function(__VA_ARGS__);
#endif

static bool few_tokens(const LinearCall& call) { TW_AT_LEVEL(call.dtype, linear_rows, call) }
static bool whole_numbers(const LinearCall& call, bool* fits) {
  TW_AT_LEVEL(call.dtype, linear_int8, call, fits)
}
static bool many_tokens(const LinearCall& call) { TW_AT_LEVEL(call.dtype, linear_forward, call) }

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
  TW_AT_LEVEL(call.forward.dtype, linear_backward, call)
}

}  // namespace tw
