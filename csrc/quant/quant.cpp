// Hands a call to the kernels of the level in use.
#include "quant/quant.h"

#include "common/at_level.h"

namespace tw {

void decode_weight(const DecodeWeightCall& call) { TW_AT_LEVEL(current_isa(), decode_weight, call) }

}  // namespace tw
