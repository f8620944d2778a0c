// Hands a call to the kernels of the level in use.
#include "attention/attention.h"

#include "common/at_level.h"

namespace tw {

bool attention_forward(const AttentionCall& call) {
  TW_AT_LEVEL(isa_for(call.dtype), attention_forward, call)
}
bool attention_backward(const BackwardCall& call) {
  TW_AT_LEVEL(isa_for(call.forward.dtype), attention_backward, call)
}
bool attention_decode(const DecodeCall& call) { TW_AT_LEVEL(isa_for(call.dtype), attention_decode, call) }

}  // namespace tw
