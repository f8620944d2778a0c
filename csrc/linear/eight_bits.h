// Activations rounded to 8 bits, one scale a row.
#pragma once

#include "common/gemm_tile.h"
#include "linear/linear.h"

namespace tw {
namespace {

constexpr float kMostCode = 127.0f;

// the largest lane; 0 where none is above it
inline float largest_of(vf x) {
  float lanes[W], largest = 0.0f;
  store(lanes, x);
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// max |x| / 127 of a row; NaN if the row holds an infinity or a NaN, which then is all that becomes of it
template <class T>
inline float eight_bit_scale(const T* x, int64_t n) {
  vf most_of = zero(), poison = zero();
  for (int64_t i = 0; i < n; i += W) {
    const vf value = n - i >= W ? load(x + i) : load_n(x + i, static_cast<int>(n - i));
    most_of = max(abs(value), most_of);
    poison = fma(value, zero(), poison);  // 0, or NaN from the first infinity or NaN on
  }
  return largest_of(most_of) / kMostCode + sum(poison);
}

// x / scale as a whole number, ties to even; 0 where the scale is 0
inline vf eight_bit_code(vf x, float scale) {
  if (!(scale > 0.0f)) return zero();
  return max(set1(-kMostCode), min(set1(kMostCode), round_nearest(div(x, set1(scale)))));
}

template <class C>
inline void round_to_codes(C* row, int64_t n, float scale) {
  for (int64_t i = 0; i < n; i += W) {
    const int some = static_cast<int>(n - i < W ? n - i : W);
    store_n(row + i, eight_bit_code(load_n(row + i, some), scale), some);
  }
}

}  // namespace
}  // namespace tw
