// Hands a call to the kernels of the level in use.
#include "attention/attention.h"

#include "common/isa.h"

namespace tw {

namespace {

// The matrix unit multiplies bf16: everything else runs one level below.
[[maybe_unused]] Isa isa_for(DType dtype) {
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

bool attention_forward(const AttentionCall& call) { TW_AT_LEVEL(attention_forward, call, call.dtype) }
bool attention_backward(const BackwardCall& call) {
  TW_AT_LEVEL(attention_backward, call, call.forward.dtype)
}
bool attention_decode(const DecodeCall& call) { TW_AT_LEVEL(attention_decode, call, call.dtype) }

}  // namespace tw
