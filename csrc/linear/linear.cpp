// Hands a call to the kernels of the level in use.
#include "linear/linear.h"

#include "common/isa.h"

namespace tw {

namespace {

// Up to so many tokens a packed weight is decoded in registers, once for all. A matrix unit is worth a panel
// from fewer on.
constexpr int64_t kFewTokens = 16, kFewTokensBesideUnit = 4;

// The matrix unit multiplies bf16: everything else runs one level below.
Isa isa_for(DType dtype) {
  const Isa isa = current_isa();
  return isa == Isa::amx && dtype != DType::bf16 ? Isa::avx512_bf16 : isa;
}

}  // namespace

#if defined(TW_BUILT_X86_LEVELS)
#define TW_AT_LEVEL(function, call, dtype) \
  switch (isa_for(dtype)) {                \
    case Isa::amx:                         \
      return amx::function(call);          \
    case Isa::avx512_bf16:                 \
      return avx512_bf16::function(call);  \
    case Isa::avx512:                      \
      return avx512::function(call);       \
    case Isa::avx2:                        \
      return avx2::function(call);         \
    default:                               \
      return portable::function(call);     \
  }
#else
#define TW_AT_LEVEL(function, call, dtype) return portable::function(call);
#endif

bool linear_forward(const LinearCall& call) {
  const int64_t few = isa_for(call.dtype) == Isa::amx ? kFewTokensBesideUnit : kFewTokens;
  if (call.tokens <= few && !call.weight.data && !(call.dropout_p > 0)) {
    TW_AT_LEVEL(linear_rows, call, call.dtype)
  }
  TW_AT_LEVEL(linear_forward, call, call.dtype)
}
bool linear_backward(const LinearBackwardCall& call) {
  TW_AT_LEVEL(linear_backward, call, call.forward.dtype)
}

}  // namespace tw
