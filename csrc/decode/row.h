// What a thread needs to sample from a row.
#pragma once

#include "common/arena.h"

namespace tw {
namespace {

constexpr int64_t kPad = 16;  // floats: the widest vector

struct RowScratch {
  float* x;          // logits, later those of the tokens that are left; padded with -inf
  float* weight;     // exp of what they lie below the largest
  int32_t* index;    // of the tokens that are left
  uint32_t* counts;  // of each token among the row's ids; all zero between rows
  uint32_t* key;     // of tokens that a selection has not decided on
  float* mass;       // their weights

  static RowScratch take(Arena* arena, int64_t vocabulary) {
    const int64_t n = round_up(vocabulary, kPad);
    RowScratch s;
    s.x = arena->take<float>(n);
    s.weight = arena->take<float>(n);
    s.index = arena->take<int32_t>(n);
    s.counts = arena->take<uint32_t>(n);
    s.key = arena->take<uint32_t>(n);
    s.mass = arena->take<float>(n);
    return s;
  }
};

}  // namespace
}  // namespace tw
