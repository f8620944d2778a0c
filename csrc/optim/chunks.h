// Who takes which chunk of which tensor.
#pragma once

#include "common/extents.h"
#include "common/parallel.h"
#include "optim/optim.h"

namespace tw {
namespace {

constexpr int64_t kSerialEntries = 12 << 10;  // about 20 microseconds of one core

inline int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }

// body(item, begin, end, chunk) for each chunk of each item; first_chunks (n_items + 1) counts them.
template <class Sizes, class Body>
inline void over_chunks(const Sizes& size_of, const int64_t* first_chunks, int64_t n_items, int threads,
                        const Body& body) {
  const auto run = [&](int64_t item, int64_t chunk) {
    const int64_t begin = (chunk - first_chunks[item]) * kChunk;
    body(item, begin, least(size_of(item), begin + kChunk), chunk);
  };
  int64_t entries = 0;
  for (int64_t i = 0; i < n_items && entries < kSerialEntries; ++i) entries += size_of(i);
  if (threads <= 1 || entries < kSerialEntries) {
    for (int64_t i = 0; i < n_items; ++i)
      for (int64_t c = first_chunks[i]; c < first_chunks[i + 1]; ++c) run(i, c);
    return;
  }
  int64_t taken = 0;
  run_team(threads, [&](const Team&) {
    int64_t item = 0;  // chunks come in ascending order to each thread
    for (int64_t c; (c = take_next(&taken)) < first_chunks[n_items];) {
      while (first_chunks[item + 1] <= c) ++item;
      run(item, c);
    }
  });
}

}  // namespace
}  // namespace tw
