// Lines of codes times a few tokens: nothing decoded is stored.
#pragma once

#include "common/packed_lines.h"

namespace tw {
namespace {

// Adds a line's inputs to the sums of ROWS tokens, whose values are `ld` apart. Inputs one by one as floats:
template <class X, Codes KIND, bool IN_PAIRS = sizeof(X) == 2>
struct LineProduct {
  const Table table;

  explicit LineProduct(const float* t) : table(t) {}

  template <int ROWS>
  [[gnu::always_inline]] void add(vf (&part)[ROWS], vi words, const X* x, int64_t ld) const {
    each_input<KIND>([&](auto at) {
      constexpr int K = decltype(at)::value;
      const vf value = line_value<KIND, K>(table, words);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) part[r] = fma(value, set1(x[r * ld + K]), part[r]);
    });
  }
};

// or 4-bit codes in pairs, where there is a dot product of them
template <class X, Codes KIND>
struct LineProduct<X, KIND, true> {
  static_assert(KIND == Codes::table, "8-bit codes would first have to be converted");
  const PairTable<X> table;

  explicit LineProduct(const float* t) : table(t) {}

  template <int ROWS>
  [[gnu::always_inline]] void add(vf (&part)[ROWS], vi words, const X* x, int64_t ld) const {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      const auto pair = table.at(shift_right(words, 4 * p));
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r)
        part[r] = Unit<X>::mac(part[r], Unit<X>::broadcast(x + r * ld + 2 * p), pair);
    }
  }
};

}  // namespace
}  // namespace tw
