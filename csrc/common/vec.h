// One vector vocabulary for all CPU levels. Beside matrix_unit.h and vec_codes.h the only file with #if on an
// instruction set. The level amx defines TW_ISA_avx512_bf16 as well: it has everything of that level.
//
// Everything is in an unnamed namespace: each level's object files get private copies, so the linker can
// never hand an AVX-512 copy of an inline function to the portable level.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(TW_ISA_avx2) || defined(TW_ISA_avx512) || defined(TW_ISA_avx512_bf16)
#include <immintrin.h>
#endif

namespace tw {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, NaN
  if (rest < 0x400u) {  // zero and subnormals: rest * 2^-24 is exact
    const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;
    return bits_as<float>(sign | bits_as<uint32_t>(magnitude));
  }
  return bits_as<float>(sign | ((rest << 13) + (112u << 23)));
}

// Round to nearest, ties to even; NaN stays NaN.
template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(u >> 16 | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (a >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more round to inf
  if (a < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the bottom
    const float shifted = bits_as<float>(a) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_as<uint32_t>(shifted) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | ((a - (112u << 23) + 0xfffu + (a >> 13 & 1u)) >> 13))};
}

// vf: W floats.  vm: a mask of W lanes.
#if defined(TW_ISA_avx512) || defined(TW_ISA_avx512_bf16)

constexpr int W = 16;
constexpr int kMicroVectors = 4;  // of a microkernel's row: 4 x 4 accumulators of 32 registers
using vf = __m512;
using vm = __mmask16;
using vi = __m512i;

inline vm first_lanes(int n) { return static_cast<vm>(n >= 16 ? 0xffffu : (1u << n) - 1u); }
inline vf zero() { return _mm512_setzero_ps(); }
inline vf set1(float x) { return _mm512_set1_ps(x); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline vf load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline void store_n(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline vf min(vf a, vf b) { return _mm512_min_ps(a, b); }  // b where either is NaN
inline vf abs(vf a) { return _mm512_abs_ps(a); }
inline vf sign_of(vf magnitude, vf sign) {
  const vi bit = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign), _mm512_castps_si512(magnitude), 0xca));
}
inline vm lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline vm le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline vm both(vm a, vm b) { return a & b; }
inline vm either(vm a, vm b) { return a | b; }
inline bool any(vm m) { return m != 0; }
inline vf select(vm m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
inline float sum(vf a) { return _mm512_reduce_add_ps(a); }

inline vf round_nearest(vf a) { return _mm512_roundscale_ps(a, 0); }
// x * 2^n for x in [0.5, 2] and whole n; exact zero for n < -125, -inf included: masked and not left to
// scalef, which takes over a hundred clocks on Intel where its result is not a normal number
inline vf scale_by_power(vf x, vf n) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, set1(-125.0f), _CMP_NLT_UQ), x, n);
}
inline vf above_least_exponent(vf x) { return x; }

inline vf load(const bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline vf load_n(const bf16* p, int n) {
  const __m256i raw = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline vf load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline vf load_n(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline __m256i narrow_bf16(vf x) {
#if defined(TW_ISA_avx512_bf16)
  return bits_as<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const vi u = _mm512_castps_si512(x);
  const vi odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const vi rounded = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
  const vi quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  const vm is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16));
#endif
}
inline void store(bf16* p, vf x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x)); }
inline void store_n(bf16* p, vf x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(x)); }
inline void store(f16* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_n(f16* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// r[i] lane j  <->  r[j] lane i
inline void transpose(vf (&r)[16]) {
  vf t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  // r[4 g + c] now holds, in its 128-bit lane l, column 4 l + c of rows 4 g .. 4 g + 3
  for (int c = 0; c < 4; ++c) {
    const vf ab_low = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);   // lanes 0, 2 of both
    const vf ab_high = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);  // lanes 1, 3
    const vf cd_low = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const vf cd_high = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_f32x4(ab_low, cd_low, 0x88);
    t[4 + c] = _mm512_shuffle_f32x4(ab_high, cd_high, 0x88);
    t[8 + c] = _mm512_shuffle_f32x4(ab_low, cd_low, 0xdd);
    t[12 + c] = _mm512_shuffle_f32x4(ab_high, cd_high, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// lane i = the sum of r[i]'s lanes
inline vf sum_each(const vf (&r)[16]) {
  vf x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // rows 4 i .. 4 i + 3, in every 128-bit lane
    const vf ab = add(_mm512_unpacklo_ps(r[4 * i], r[4 * i + 1]), _mm512_unpackhi_ps(r[4 * i], r[4 * i + 1]));
    const vf cd =
        add(_mm512_unpacklo_ps(r[4 * i + 2], r[4 * i + 3]), _mm512_unpackhi_ps(r[4 * i + 2], r[4 * i + 3]));
    const __m512d ab2 = _mm512_castps_pd(ab), cd2 = _mm512_castps_pd(cd);
    x[i] =
        add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
  }
  const vf p = add(_mm512_shuffle_f32x4(x[0], x[1], 0x88), _mm512_shuffle_f32x4(x[0], x[1], 0xdd));
  const vf q = add(_mm512_shuffle_f32x4(x[2], x[3], 0x88), _mm512_shuffle_f32x4(x[2], x[3], 0xdd));
  return add(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
}

#elif defined(TW_ISA_avx2)

constexpr int W = 8;
constexpr int kMicroVectors = 2;  // 4 x 2 accumulators of 16 registers
using vf = __m256;
using vm = __m256;
using vi = __m256i;

inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline vf zero() { return _mm256_setzero_ps(); }
inline vf set1(float x) { return _mm256_set1_ps(x); }
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline vf load_n(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline void store_n(float* p, vf x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline vf sign_of(vf magnitude, vf sign) {
  const vf bit = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_and_ps(bit, sign), _mm256_andnot_ps(bit, magnitude));
}
inline vm lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline vm le(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
inline vm both(vm a, vm b) { return _mm256_and_ps(a, b); }
inline vm either(vm a, vm b) { return _mm256_or_ps(a, b); }
inline bool any(vm m) { return _mm256_movemask_ps(m) != 0; }
inline vf select(vm m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
inline float sum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

inline vf round_nearest(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for x in [0.5, 2] and whole n in [-127, 127]; n = -127 gives zero
inline vf scale_by_power(vf x, vf n) {
  const vi exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline vf above_least_exponent(vf x) { return max(set1(-127.0f), x); }

inline vf widen_bf16(__m128i raw) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
template <class T>
inline __m128i raw_n(const T* p, int n) {
  __m128i raw = _mm_setzero_si128();
  memcpy(&raw, p, 2 * static_cast<size_t>(n < 8 ? n : 8));
  return raw;
}
inline vf load(const bf16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline vf load_n(const bf16* p, int n) { return widen_bf16(raw_n(p, n)); }
inline vf load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline vf load_n(const f16* p, int n) { return _mm256_cvtph_ps(raw_n(p, n)); }
inline __m128i narrow_bf16(vf x) {
  const vi u = _mm256_castps_si256(x);
  const vi odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const vi rounded = _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff));
  const vi quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const vi is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const vi top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
}
inline void store(bf16* p, vf x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(x)); }
inline void store_n(bf16* p, vf x, int n) {
  const __m128i raw = narrow_bf16(x);
  memcpy(p, &raw, 2 * static_cast<size_t>(n < 8 ? n : 8));
}
inline void store(f16* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_n(f16* p, vf x, int n) {
  const __m128i raw = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  memcpy(p, &raw, 2 * static_cast<size_t>(n < 8 ? n : 8));
}

inline void transpose(vf (&r)[8]) {
  vf t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

inline vf sum_each(const vf (&r)[8]) {
  vf x[2];
  for (int i = 0; i < 2; ++i) {
    const vf ab = add(_mm256_unpacklo_ps(r[4 * i], r[4 * i + 1]), _mm256_unpackhi_ps(r[4 * i], r[4 * i + 1]));
    const vf cd =
        add(_mm256_unpacklo_ps(r[4 * i + 2], r[4 * i + 3]), _mm256_unpackhi_ps(r[4 * i + 2], r[4 * i + 3]));
    x[i] = add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  }
  return add(_mm256_permute2f128_ps(x[0], x[1], 0x20), _mm256_permute2f128_ps(x[0], x[1], 0x31));
}

#else  // portable: the compiler's own four-float vectors, any processor

constexpr int W = 4;
constexpr int kMicroVectors = 2;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
using vm = vi;

inline vf zero() { return vf{0, 0, 0, 0}; }
inline vf set1(float x) { return vf{x, x, x, x}; }
template <class T>
inline vf load_n(const T* p, int n) {
  vf x = zero();
  for (int i = 0; i < 4 && i < n; ++i) x[i] = to_float(p[i]);
  return x;
}
inline vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof(x));
  return x;
}
inline vf load(const bf16* p) { return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline vf load(const f16* p) { return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
template <class T>
inline void store_n(T* p, vf x, int n) {
  for (int i = 0; i < 4 && i < n; ++i) p[i] = from_float<T>(x[i]);
}
template <class T>
inline void store(T* p, vf x) {
  store_n(p, x, 4);
}
inline void store(float* p, vf x) { memcpy(p, &x, sizeof(x)); }
inline vf add(vf a, vf b) { return a + b; }
inline vf sub(vf a, vf b) { return a - b; }
inline vf mul(vf a, vf b) { return a * b; }
inline vf div(vf a, vf b) { return a / b; }
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
inline vm lt(vf a, vf b) { return a < b; }
inline vm le(vf a, vf b) { return a <= b; }
inline vm both(vm a, vm b) { return a & b; }
inline vm either(vm a, vm b) { return a | b; }
inline bool any(vm m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
inline vf select(vm m, vf yes, vf no) { return bits_as<vf>((m & bits_as<vi>(yes)) | (~m & bits_as<vi>(no))); }
inline vf max(vf a, vf b) { return select(a > b, a, b); }
inline vf min(vf a, vf b) { return select(a < b, a, b); }
inline vf abs(vf a) { return bits_as<vf>(bits_as<vi>(a) & 0x7fffffff); }
inline vf sign_of(vf magnitude, vf sign) {
  return bits_as<vf>((bits_as<vi>(sign) & INT32_MIN) | (bits_as<vi>(magnitude) & INT32_MAX));
}
inline float sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline vf round_nearest(vf a) {  // |a| < 2^22; adding 1.5 * 2^23 leaves no bits for a fraction
  const vf magic = set1(12582912.0f);
  return (a + magic) - magic;
}
inline vf scale_by_power(vf x, vf n) { return x * bits_as<vf>((__builtin_convertvector(n, vi) + 127) << 23); }
inline vf above_least_exponent(vf x) { return max(set1(-127.0f), x); }
inline void transpose(vf (&r)[4]) {
  const vf a = r[0], b = r[1], c = r[2], d = r[3];
  for (int i = 0; i < 4; ++i) r[i] = vf{a[i], b[i], c[i], d[i]};
}
inline vf sum_each(const vf (&r)[4]) { return vf{sum(r[0]), sum(r[1]), sum(r[2]), sum(r[3])}; }

#endif

// Whether products of bf16 are those of matrix_unit.h.
#if defined(TW_ISA_amx)
constexpr bool kHasMatrixUnit = true;
#else
constexpr bool kHasMatrixUnit = false;
#endif

// The unit of a matrix product: `kDepth` consecutive inner elements are multiplied and added at once.
//   float  one fma         lane n of b holds B[k][n]
//   bf16   one dot of two  lane n of b holds the pair B[2 k][n], B[2 k + 1][n]
// A product has a multiple of kRowStep rows and of kDepthStep units of depth.
// Levels without a bf16 dot product compute bf16 input in float.
template <class C>
struct Unit;
template <>
struct Unit<float> {
  static constexpr int kDepth = 1;
  static constexpr int kRowStep = 4;
  static constexpr int kDepthStep = 1;
  static constexpr int kExpTerms = 6;
  static inline vf lanes(const float* p) { return load(p); }
  static inline vf broadcast(const float* p) { return set1(*p); }
  static inline vf mac(vf acc, vf a, vf b) { return fma(a, b, acc); }
};

// What an input type is multiplied as: bf16 as bf16 where the processor can, everything else as float.
template <class T>
struct ComputeType {
  using type = float;
};

#if defined(TW_ISA_avx512_bf16)
constexpr bool kHasBf16Dot = true;
template <>
struct ComputeType<bf16> {
  using type = bf16;
};
template <>
struct Unit<bf16> {
  static constexpr int kDepth = 2;
  static constexpr int kRowStep = kHasMatrixUnit ? 16 : 4;
  static constexpr int kDepthStep = kHasMatrixUnit ? 16 : 1;
  static constexpr int kExpTerms = 5;  // the weights are rounded to bf16 right after
  static inline __m512bh lanes(const bf16* p) { return bits_as<__m512bh>(_mm512_loadu_si512(p)); }
  static inline __m512bh broadcast(const bf16* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof(pair));
    return bits_as<__m512bh>(_mm512_set1_epi32(pair));
  }
  static inline vf mac(vf acc, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(acc, a, b); }
};
#else
constexpr bool kHasBf16Dot = false;
#endif

// p[2 n] = even lane n, p[2 n + 1] = odd lane n: two rows become one row of pairs.
inline void store_pairs(bf16* p, vf even, vf odd) {
#if defined(TW_ISA_avx512_bf16)
  const __m512i both_rows = bits_as<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both_rows));
#else
  bf16 a[W], b[W];
  store(a, even);
  store(b, odd);
  for (int i = 0; i < W; ++i) {
    p[2 * i] = a[i];
    p[2 * i + 1] = b[i];
  }
#endif
}

// The same from two rows of bf16 as they lie in memory, W elements each.
inline void interleave(bf16* p, const bf16* even, const bf16* odd) {
#if defined(TW_ISA_avx512) || defined(TW_ISA_avx512_bf16)
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                         38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i a = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
  const __m512i b = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(a, order, b));
#else
  for (int i = 0; i < W; ++i) {
    p[2 * i] = even[i];
    p[2 * i + 1] = odd[i];
  }
#endif
}

// 2 W neighbours as two vectors in whatever order is cheapest; `wide_place` tells where element i went.
template <class T>
inline void load_wide(const T* p, vf& first, vf& second) {
  first = load(p);
  second = load(p + W);
}
template <class T>
constexpr int wide_place(int i) {
  return i;
}
#if defined(TW_ISA_avx2) || defined(TW_ISA_avx512) || defined(TW_ISA_avx512_bf16)
// even elements, then odd ones: a shift and a mask instead of two widening shuffles
template <>
inline void load_wide<bf16>(const bf16* p, vf& first, vf& second) {
  vi raw;
  memcpy(&raw, p, sizeof(raw));
#if defined(TW_ISA_avx2)
  first = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
  second = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
#else
  first = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
  second = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
#endif
}
template <>
constexpr int wide_place<bf16>(int i) {
  return i / (2 * W) * (2 * W) + i % 2 * W + i % (2 * W) / 2;
}
#endif

// 2^x, for x <= 0 or so: relative error 2e-9 before rounding with TERMS = 6, 1e-7 with 5; exactly 0 from
// the least normal exponent or one above it down, -inf included; NaN stays NaN.
template <int TERMS>
inline vf exp2_of(vf x) {
  x = above_least_exponent(x);
  const vf n = round_nearest(x);
  const vf f = sub(x, n);  // [-0.5, 0.5]
  vf p;                    // minimax fit of 2^f with constant term 1
  if constexpr (TERMS == 6) {
    p = fma(set1(1.535336159e-4f), f, set1(1.339887452e-3f));
    p = fma(p, f, set1(9.618437360e-3f));
    p = fma(p, f, set1(5.550332471e-2f));
    p = fma(p, f, set1(2.402264791e-1f));
    p = fma(p, f, set1(6.931472029e-1f));
  } else {
    p = fma(set1(1.326472639e-3f), f, set1(9.671512697e-3f));
    p = fma(p, f, set1(5.550733746e-2f));
    p = fma(p, f, set1(2.402224208e-1f));
    p = fma(p, f, set1(6.931469776e-1f));
  }
  p = fma(p, f, set1(1.0f));
  return scale_by_power(p, n);
}

// tanh x: absolute error 1e-7, relative error 3e-7 near 0.
inline vf tanh_of(vf x) {
  constexpr float kLog2E = 1.44269504f;
  const vf magnitude = abs(x), z = mul(x, x);
  // small |x|: odd polynomial (Cephes tanhf)
  vf p = fma(set1(-5.70498872745e-3f), z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const vf small = fma(mul(p, z), x, x);
  // else 1 - 2 e / (1 + e) with e = exp(-2 |x|)
  const vf e = exp2_of<6>(mul(magnitude, set1(-2.0f * kLog2E)));
  const vf large = sub(set1(1.0f), div(add(e, e), add(set1(1.0f), e)));
  return select(lt(magnitude, set1(0.625f)), small, sign_of(large, x));
}

}  // namespace
}  // namespace tw
