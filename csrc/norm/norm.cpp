// Hands calls to the kernels of the level in use, with scratch memory and the order of an embedding's tokens.
#include "norm/norm.h"

#include "common/arena.h"
#include "common/at_level.h"
#include "common/workspace.h"

namespace tw {
namespace {

constexpr int64_t kBlockRows = 16;  // at least, so that adding up the blocks stays small
constexpr int64_t kMostBlocks = 64;
constexpr int64_t kMostPartials = 4 << 20;  // floats

void norm_backward_at_level(const NormBackwardCall& call, int64_t n_blocks) {
  TW_AT_LEVEL(isa_for(call.forward.dtype), norm_backward, call, n_blocks)
}

void embedding_backward_at_level(const EmbeddingBackwardCall& call) {
  TW_AT_LEVEL(isa_for(call.dtype), embedding_backward, call)
}

}  // namespace

void norm_forward(const NormCall& call) { TW_AT_LEVEL(isa_for(call.dtype), norm_forward, call) }
void rope(const RopeCall& call) { TW_AT_LEVEL(isa_for(call.dtype), rope, call) }
void gated_forward(const GatedCall& call) { TW_AT_LEVEL(isa_for(call.dtype), gated_forward, call) }
void gated_backward(const GatedCall& call) { TW_AT_LEVEL(isa_for(call.dtype), gated_backward, call) }
void embedding_forward(const EmbeddingCall& call){TW_AT_LEVEL(current_isa(), embedding_forward, call)}

// A matter of shape alone: the sums over rows must not depend on the number of threads.
int64_t norm_blocks(int64_t n_rows, int64_t width) {
  const int64_t wanted = least(kMostBlocks, (n_rows + kBlockRows - 1) / kBlockRows);
  return most(1, least(wanted, kMostPartials / most(1, 2 * width)));
}

bool norm_backward(NormBackwardCall call) {
  const int64_t n_blocks = norm_blocks(call.forward.n_rows, call.forward.width);
  const int64_t n_sums = (call.dweight != nullptr) + (call.dbias != nullptr);
  char* block = nullptr;
  if (n_sums) {
    Arena measured{nullptr};
    for (int64_t i = 0; i < n_blocks * n_sums; ++i) measured.take<float>(call.forward.width);
    block = take_workspace(reinterpret_cast<int64_t>(measured.at));
    if (!block) return false;
  }
  call.partials = reinterpret_cast<float*>(block);
  norm_backward_at_level(call, n_blocks);
  if (block) give_workspace(block);
  return true;
}

int64_t first_stray(const int64_t* ids, int64_t n_ids, int64_t n_rows) {
  for (int64_t t = 0; t < n_ids; ++t)
    if (ids[t] < 0 || ids[t] >= n_rows) return t;
  return -1;
}

bool embedding_backward(EmbeddingBackwardCall call) {
  Arena measured{nullptr};
  measured.take<int64_t>(call.n_rows + 1);
  measured.take<int64_t>(call.n_ids);
  char* block = take_workspace(reinterpret_cast<int64_t>(measured.at));
  if (!block) return false;
  Arena arena{block};
  int64_t* begins = arena.take<int64_t>(call.n_rows + 1);
  int64_t* tokens = arena.take<int64_t>(call.n_ids);
  for (int64_t v = 0; v <= call.n_rows; ++v) begins[v] = 0;
  for (int64_t t = 0; t < call.n_ids; ++t) ++begins[call.ids[t]];
  for (int64_t v = 0, sum = 0; v <= call.n_rows; ++v) begins[v] = sum += begins[v];
  // from the last token back, each takes the last free place of its row: ends become begins
  for (int64_t t = call.n_ids; t-- > 0;) tokens[--begins[call.ids[t]]] = t;
  call.begins = begins;
  call.tokens = tokens;
  embedding_backward_at_level(call);
  give_workspace(block);
  return true;
}

}  // namespace tw
