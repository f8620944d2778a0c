// Hands a call to the kernels of the level in use, and sorts what they found.
#include "sparse/sparse.h"

#include <algorithm>

#include "common/at_level.h"

namespace tw {

namespace {

// A total order: whatever the order in which entries were met, the same k are the largest.
bool comes_before(const LargeEntry& a, const LargeEntry& b) {
  if (a.size != b.size) return a.size > b.size;
  return a.row != b.row ? a.row < b.row : a.column < b.column;
}

}  // namespace

int64_t keep_largest(LargeEntry* entries, int64_t n, int64_t k, float* least_size) {
  if (n < k || k == 0) return std::min(n, k);
  std::nth_element(entries, entries + (k - 1), entries + n, comes_before);
  *least_size = entries[k - 1].size;
  return k;
}

void write_places(const LargeEntry* entries, int64_t n, int64_t in_features, int64_t* places) {
  for (int64_t i = 0; i < n; ++i) places[i] = entries[i].row * in_features + entries[i].column;
  std::sort(places, places + n);
}

bool sparse_largest(const LargestCall& call) { TW_AT_LEVEL(isa_for(call.dtype), sparse_largest, call) }

}  // namespace tw
