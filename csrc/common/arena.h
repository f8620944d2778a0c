// Pieces of one block of scratch memory.
#pragma once

#include "common/extents.h"

namespace tw {
namespace {

// Hands out pieces in order, each aligned to a cache line. From nullptr on it only measures: `at` is then
// what all of them take.
struct Arena {
  char* at;
  template <class T>
  T* take(int64_t n) {
    T* piece = reinterpret_cast<T*>(at);
    at += round_up(n * static_cast<int64_t>(sizeof(T)), kCacheLine);
    return piece;
  }
};

}  // namespace
}  // namespace tw
