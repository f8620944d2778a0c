// Hands a call to the kernels of the level in use.
#include "quant/quant.h"

#include "common/isa.h"

namespace tw {

void decode_weight(const DecodeWeightCall& call) {
#if defined(TW_BUILT_X86_LEVELS)
  switch (current_isa()) {
    case Isa::amx:
      return amx::decode_weight(call);
    case Isa::avx512_bf16:
      return avx512_bf16::decode_weight(call);
    case Isa::avx512:
      return avx512::decode_weight(call);
    case Isa::avx2:
      return avx2::decode_weight(call);
    default:
      break;
  }
#endif
  portable::decode_weight(call);
}

}  // namespace tw
