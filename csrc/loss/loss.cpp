// Hands calls to the kernels of the level in use.
#include "loss/loss.h"

#include "common/at_level.h"

namespace tw {

void head_rows(const HeadRowsCall& call) { TW_AT_LEVEL(isa_for(call.dtype), head_rows, call) }

}  // namespace tw
