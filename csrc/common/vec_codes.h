// What packed weights need beside vec.h: words of codes, one output row a lane, into values.
// With vec.h and matrix_unit.h the only files with #if on an instruction set.
#pragma once

#include "common/vec.h"

namespace tw {
namespace {

#if defined(TW_ISA_avx512) || defined(TW_ISA_avx512_bf16)

inline vi load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }

// Sixteen values, found by the low four bits of each word.
struct Table {
  vf values;
  explicit Table(const float* t) : values(load(t)) {}
  vf at(vi words) const { return _mm512_permutexvar_ps(words, values); }
};

inline vi shift_right(vi words, int bits) { return _mm512_srli_epi32(words, static_cast<unsigned>(bits)); }
// byte J of each word as a signed number
template <int J>
inline vf signed_byte(vi words) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 24 - 8 * J), 24));
}
// the bits of float8_e4m3fn in byte J, as a float 2^120 times too small
template <int J>
inline vf tiny_e4m3(vi words) {
  const vi b = _mm512_srli_epi32(words, 8 * J);
  const vi sign = _mm512_slli_epi32(_mm512_and_si512(b, _mm512_set1_epi32(0x80)), 24);
  return _mm512_castsi512_ps(
      _mm512_or_si512(sign, _mm512_slli_epi32(_mm512_and_si512(b, _mm512_set1_epi32(0x7f)), 20)));
}

// lane r = table[index[r]], one index a byte
inline vf gather_bytes(const float* table, const uint8_t* index) {
  const vi at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
  return _mm512_i32gather_ps(at, table, 4);
}

#elif defined(TW_ISA_avx2)

inline vi load_words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

struct Table {
  vf low, high;
  explicit Table(const float* t) : low(load(t)), high(load(t + 8)) {}
  vf at(vi words) const {
    const vf upper = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28));  // bit 3 as the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, words), _mm256_permutevar8x32_ps(high, words),
                            upper);
  }
};

inline vi shift_right(vi words, int bits) { return _mm256_srl_epi32(words, _mm_cvtsi32_si128(bits)); }
template <int J>
inline vf signed_byte(vi words) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 24 - 8 * J), 24));
}
template <int J>
inline vf tiny_e4m3(vi words) {
  const vi b = _mm256_srli_epi32(words, 8 * J);
  const vi sign = _mm256_slli_epi32(_mm256_and_si256(b, _mm256_set1_epi32(0x80)), 24);
  return _mm256_castsi256_ps(
      _mm256_or_si256(sign, _mm256_slli_epi32(_mm256_and_si256(b, _mm256_set1_epi32(0x7f)), 20)));
}

inline vf gather_bytes(const float* table, const uint8_t* index) {
  const vi at = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
  return _mm256_i32gather_ps(table, at, 4);
}

#else

inline vi load_words(const uint8_t* p) {
  vi words;
  memcpy(&words, p, sizeof(words));
  return words;
}

struct Table {
  const float* values;
  explicit Table(const float* t) : values(t) {}
  vf at(vi words) const {
    return vf{values[words[0] & 15], values[words[1] & 15], values[words[2] & 15], values[words[3] & 15]};
  }
};

inline vi shift_right(vi words, int bits) {
  typedef uint32_t vu __attribute__((vector_size(16)));
  return bits_as<vi>(bits_as<vu>(words) >> static_cast<unsigned>(bits));
}
template <int J>
inline vf signed_byte(vi words) {
  typedef uint32_t vu __attribute__((vector_size(16)));
  return __builtin_convertvector(bits_as<vi>(bits_as<vu>(words) << (24 - 8 * J)) >> 24, vf);
}
template <int J>
inline vf tiny_e4m3(vi words) {
  const vi b = shift_right(words, 8 * J);
  return bits_as<vf>((b & 0x80) << 24 | (b & 0x7f) << 20);
}

inline vf gather_bytes(const float* table, const uint8_t* index) {
  return vf{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}

#endif

// byte J of each word as float8_e4m3fn; its NaN is all ones
template <int J>
inline vf e4m3_byte(vi words) {
  const vf x = mul(tiny_e4m3<J>(words), set1(0x1p120f));
  return select(lt(abs(x), set1(480.0f)), x, set1(__builtin_nanf("")));
}

// Sixteen values as the products of type C take them, found by the low four bits of each half of a word.
template <class C>
struct PairTable;

#if defined(TW_ISA_avx512_bf16)

// Twice the sixteen: the instruction looks at five bits, and the fifth belongs to a neighbour.
template <>
struct PairTable<bf16> {
  vi values;
  explicit PairTable(const float* t) {
    const __m256i half = narrow_bf16(load(t));
    values = _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
  }
  __m512bh at(vi words) const { return bits_as<__m512bh>(_mm512_permutexvar_epi16(words, values)); }
};

#endif

// Products of bytes: four neighbours of an unsigned and a signed operand are multiplied and added to 32 bits.
template <class C>
struct ByteUnit;

#if defined(TW_ISA_avx512_bf16)

constexpr bool kHasByteDot = true;

template <>
struct ByteUnit<int8_t> {
  // Sums have the type of the instruction's own: an array of vi is kept in memory by gcc 12, which stores all
  // of it in each round of a loop.
  typedef int32_t Sums __attribute__((vector_size(64)));

  static vi none() { return _mm512_setzero_si512(); }
  static Sums all(int32_t x) { return Sums{} + x; }
  static vi load(const void* p) { return _mm512_loadu_si512(p); }
  static Sums load_sums(const int32_t* p) { return bits_as<Sums>(load(p)); }
  static void store(void* p, vi x) { _mm512_storeu_si512(p, x); }
  static void store(int32_t* p, Sums x) { store(p, bits_as<vi>(x)); }
  static vi broadcast(const void* p) {
    int32_t four;
    memcpy(&four, p, sizeof(four));
    return _mm512_set1_epi32(four);
  }
  static Sums mac(Sums acc, vi unsigned_four, vi signed_four) {
    return bits_as<Sums>(_mm512_dpbusd_epi32(bits_as<vi>(acc), unsigned_four, signed_four));
  }
  static vf floats(Sums x) { return _mm512_cvtepi32_ps(bits_as<vi>(x)); }
  // -128 times the sum of each word's four bytes, on top of acc
  static Sums less_128_times(Sums acc, vi signed_four) {
    return acc - mac(Sums{}, _mm512_set1_epi8(-128), signed_four);
  }

  // the values of the low or high nibbles of all bytes, by a table of 16 signed bytes
  static vi low_nibbles(const int8_t* table, vi words) { return look_up(table, words); }
  static vi high_nibbles(const int8_t* table, vi words) {
    return look_up(table, _mm512_srli_epi32(words, 4));
  }
  static vi look_up(const int8_t* table, vi words) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen),
                               _mm512_and_si512(words, _mm512_set1_epi8(15)));
  }

  // 16 whole numbers as bytes, `bias` added; in the order 0 4 1 5 2 6 3 7 of each eight if asked
  static void store_codes(uint8_t* p, vf codes, int bias, bool in_nibble_order) {
    __m128i bytes =
        _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(codes), _mm512_set1_epi32(bias)));
    if (in_nibble_order)
      bytes = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
};

#else
constexpr bool kHasByteDot = false;
#endif

}  // namespace
}  // namespace tw
