// New tokens into a key/value cache, by copying.
#include <string.h>

#include "attention/attention.h"
#include "common/extents.h"

namespace tw {
namespace {

void copy_heads(const View& from, const View& to, int64_t b, int64_t t, int64_t page, int64_t slot, int heads,
                int width, int64_t itemsize) {
  for (int h = 0; h < heads; ++h) {
    const char* source =
        static_cast<const char*>(from.data) + (b * from.batch + t * from.row + h * from.head) * itemsize;
    char* target = static_cast<char*>(to.data) + (page * to.batch + slot * to.row + h * to.head) * itemsize;
    if (from.lane == 1 && to.lane == 1) {
      memcpy(target, source, static_cast<size_t>(width * itemsize));
      continue;
    }
    for (int i = 0; i < width; ++i)
      memcpy(target + i * to.lane * itemsize, source + i * from.lane * itemsize,
             static_cast<size_t>(itemsize));
  }
}

}  // namespace

void attention_append(const AppendCall& call) {
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t t = 0; t < call.n_tokens; ++t) {
      const int64_t position = call.key_lengths[b] - call.n_tokens + t;
      int64_t page = b, slot = position;
      if (call.page_table) {
        page = call.page_table[b * call.pages_per_row + position / call.page_size];
        slot = position % call.page_size;
      }
      copy_heads(call.k, call.k_cache, b, t, page, slot, call.n_heads, call.head_dim, call.itemsize);
      copy_heads(call.v, call.v_cache, b, t, page, slot, call.n_heads, call.value_dim, call.itemsize);
    }
}

}  // namespace tw
