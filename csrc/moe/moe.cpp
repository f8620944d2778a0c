// Hands a call to the kernels of the level in use.
#include "moe/moe.h"

#include "common/at_level.h"
#include "common/extents.h"

namespace tw {

namespace {

// Where no expert has more rows, its weights are read once and meet all of them in registers.
constexpr int64_t kFewRows = 4;

int64_t most_rows(const MoeCall& call) {
  int64_t rows = 0;
  for (int64_t e = 0; e < call.experts; ++e) rows = most(rows, call.starts[e + 1] - call.starts[e]);
  return rows;
}

bool few_rows(const MoeCall& call) { TW_AT_LEVEL(isa_for(call.dtype), moe_rows, call) }
bool many_rows(const MoeCall& call) { TW_AT_LEVEL(isa_for(call.dtype), moe_forward, call) }

}  // namespace

bool moe_forward(const MoeCall& call) {
  return most_rows(call) <= kFewRows ? few_rows(call) : many_rows(call);
}
bool moe_backward(const MoeBackwardCall& call) {
  TW_AT_LEVEL(isa_for(call.forward.dtype), moe_backward, call)
}
bool moe_grouped(const GroupedCall& call) { TW_AT_LEVEL(isa_for(call.dtype), moe_grouped, call) }
bool moe_outer(const OuterCall& call) { TW_AT_LEVEL(isa_for(call.dtype), moe_outer, call) }

}  // namespace tw
