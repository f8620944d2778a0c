// Hands calls to the kernels of the level in use, with scratch memory.
#include "decode/decode.h"

#include "common/arena.h"
#include "common/at_level.h"
#include "common/workspace.h"
#include "decode/row.h"

namespace tw {
namespace {

void sample_at_level(const SampleCall& call) { TW_AT_LEVEL(isa_for(call.dtype), sample_tokens, call) }

}  // namespace

bool sample_tokens(SampleCall call) {
  Arena measured{nullptr};
  RowScratch::take(&measured, call.vocabulary);
  call.row_bytes = reinterpret_cast<int64_t>(measured.at);
  call.threads = static_cast<int>(most(1, least(call.threads, call.n_rows)));
  call.scratch = take_workspace(call.row_bytes * call.threads);
  if (!call.scratch) return false;
  sample_at_level(call);
  give_workspace(call.scratch);
  return true;
}

void tilt(const TiltCall& call) { TW_AT_LEVEL(isa_for(call.dtype), tilt, call) }

}  // namespace tw
