// Hands a call to the kernels of the level in use.
#include "attention/attention.h"

#include "common/isa.h"

namespace tw {

#if defined(TW_BUILT_X86_LEVELS)
#define TW_AT_LEVEL(function, call)       \
  switch (current_isa()) {                \
    case Isa::avx512_bf16:                \
      return avx512_bf16::function(call); \
    case Isa::avx512:                     \
      return avx512::function(call);      \
    case Isa::avx2:                       \
      return avx2::function(call);        \
    default:                              \
      return portable::function(call);    \
  }
#else
#define TW_AT_LEVEL(function, call) return portable::function(call);
#endif

bool attention_forward(const AttentionCall& call) { TW_AT_LEVEL(attention_forward, call) }
bool attention_backward(const BackwardCall& call) { TW_AT_LEVEL(attention_backward, call) }
bool attention_decode(const DecodeCall& call) { TW_AT_LEVEL(attention_decode, call) }

}  // namespace tw
