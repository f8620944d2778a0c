// A matrix in memory.
#pragma once

#include <stdint.h>

namespace tw {

// Rows of contiguous elements; `row` is the stride between rows, in elements.
struct Rows {
  void* data;
  int64_t row;
};

}  // namespace tw
