// Scratch memory of kernels: 64-byte aligned, uninitialised. Each thread keeps its last block for the next
// call (up to kKeptBytes), because fresh pages cost more than a short kernel's arithmetic.
#pragma once

#include <stdint.h>

namespace tw {

constexpr int64_t kKeptBytes = int64_t{64} << 20;

// Returns nullptr when memory is short.
char* take_workspace(int64_t bytes);
void give_workspace(char* block);

}  // namespace tw
