// Optimizer states in 8 bits: floating-point numbers of few bits, over the largest magnitude of a block.
//
//   mean     sign, 4 bits of exponent, 3 of mantissa:  2^-14 .. 1 in steps of 1/8 of a power, and 7 below
//   square         5 bits of exponent, 3 of mantissa:  2^-30 .. 1 likewise
//
// A code is the number's own bits, shifted: exponent and mantissa of x / scale, where 1 has the largest
// exponent.
#pragma once

#include "common/extents.h"
#include "common/vec.h"
#include "optim/optim.h"

namespace tw {
namespace {

constexpr int kMeanExponents = 15;  // powers from 1 down; the code 0 .. 7 below them is not normal
constexpr int kSquareExponents = 31;

// The magnitude's code for x in [0, 1]: nearest, ties to even; BITS of the exponent and 3 of the mantissa.
template <int EXPONENTS>
inline uint32_t code_of(float x) {
  // adding this power leaves the digits of a number below the least normal one at the bottom
  constexpr uint32_t least_exponent = 127 - (EXPONENTS - 1);
  const uint32_t u = bits_as<uint32_t>(x);
  const uint32_t rounded = u + 0x7ffffu + (u >> 20 & 1u);
  const uint32_t normal = (rounded >> 20) - (least_exponent - 1) * 8;
  const float shifted = x + bits_as<float>((least_exponent + 20) << 23);
  const uint32_t low = bits_as<uint32_t>(shifted) & 0xffu;
  return u < least_exponent << 23 ? low : normal;
}
template <int EXPONENTS>
inline float value_of(uint32_t code) {
  constexpr uint32_t least_exponent = 127 - (EXPONENTS - 1);
  constexpr float least_normal = 1.0f / static_cast<float>(1u << (EXPONENTS - 1));
  const float normal = bits_as<float>((code + (least_exponent - 1) * 8) << 20);
  const float below = normal + normal - least_normal;  // of exponent 0: without the leading 1
  return code < 8 ? below : normal;
}

// The largest magnitude, NaN if there is one: bits without their sign are in the order of what they stand
// for.
inline float largest_of(const float* __restrict x, int n) {
  uint32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_as<uint32_t>(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return bits_as<float>(largest);
}

inline void read_means(const uint8_t* __restrict codes, float scale, float* __restrict x, int n) {
  for (int i = 0; i < n; ++i) {
    const uint32_t code = codes[i];
    const float magnitude = scale * value_of<kMeanExponents>(code & 0x7fu);
    x[i] = bits_as<float>(bits_as<uint32_t>(magnitude) | (code & 0x80u) << 24);
  }
}
inline void read_squares(const uint8_t* __restrict codes, float scale, float* __restrict x, int n) {
  for (int i = 0; i < n; ++i) x[i] = scale * value_of<kSquareExponents>(codes[i]);
}
inline float inverse_of(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }
inline float at_most_one(float x) { return x < 1.0f ? x : 1.0f; }

inline float write_means(const float* __restrict x, uint8_t* __restrict codes, int n) {
  const float scale = largest_of(x, n), inverse = inverse_of(scale);
  for (int i = 0; i < n; ++i) {
    const uint32_t u = bits_as<uint32_t>(x[i]);
    const float magnitude = at_most_one(bits_as<float>(u & 0x7fffffffu) * inverse);
    codes[i] = static_cast<uint8_t>(code_of<kMeanExponents>(magnitude) | (u >> 24 & 0x80u));
  }
  return scale;
}
// What is not 0 gets no code of 0: a step divides by its root.
inline float write_squares(const float* __restrict x, uint8_t* __restrict codes, int n) {
  const float scale = largest_of(x, n), inverse = inverse_of(scale);
  for (int i = 0; i < n; ++i) {
    const uint32_t u = bits_as<uint32_t>(x[i]) & 0x7fffffffu;
    const uint32_t code = code_of<kSquareExponents>(at_most_one(bits_as<float>(u) * inverse));
    const uint32_t is_something = (u + 0x7fffffffu) >> 31, has_no_code = (code - 1) >> 31;
    codes[i] = static_cast<uint8_t>(code | (is_something & has_no_code));
  }
  return scale;
}

}  // namespace
}  // namespace tw
