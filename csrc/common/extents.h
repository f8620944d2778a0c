// Arithmetic of extents.
#pragma once

#include <stdint.h>

namespace tw {
namespace {

constexpr int64_t kCacheLine = 64;  // bytes; what scratch memory is aligned to

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace
}  // namespace tw
