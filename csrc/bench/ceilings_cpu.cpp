#include "bench/ceilings.h"
#include "common/matrix_unit.h"
#include "common/parallel.h"

namespace tw::TW_ISA {

namespace {

// Independent sums: enough to fill two multiply-add units of latency 5, and few enough to stay, with both
// factors, in the 16 registers of the smaller levels.
constexpr int kChains = 12;

volatile float sink;  // what is stored here cannot be optimised away

// mac(sum, chain) -> sum, kChains of them, `rounds` times
template <class Sum, class Mac>
inline void run_chains(Sum (&sums)[kChains], int64_t rounds, const Mac& mac) {
  for (int64_t round = 0; round < rounds; ++round)
    for (int i = 0; i < kChains; ++i) sums[i] = mac(sums[i]);
}

template <int STREAMS>
float sum_streams(const float* data, int64_t n) {
  constexpr int kLine = 16;  // floats of a cache line
  vf sums[STREAMS][kLine / W];
  for (auto& stream : sums)
    for (vf& lane : stream) lane = zero();
  const int64_t part = n / STREAMS / kLine * kLine;
  for (int64_t i = 0; i < part; i += kLine)
    for (int s = 0; s < STREAMS; ++s)
      for (int j = 0; j < kLine / W; ++j) sums[s][j] = add(sums[s][j], load(data + s * part + i + j * W));
  float total = 0.0f;
  for (const auto& stream : sums)
    for (const vf lane : stream) total += sum(lane);
  for (int64_t i = part * STREAMS; i < n; ++i) total += data[i];
  return total;
}

// a template, so that levels without Unit<bf16> drop the body
template <class T>
double dot_of_two([[maybe_unused]] int64_t rounds, [[maybe_unused]] int threads) {
  if constexpr (kHasBf16Dot) {
    constexpr int kElements = 2 * W;
    T ones[kElements], smalls[kElements];
    for (int i = 0; i < kElements; ++i) {
      ones[i] = from_float<T>(1.0f);
      smalls[i] = from_float<T>(1e-3f);
    }
    run_team(threads, [&](Team) {
      if constexpr (kHasMatrixUnit) {
        const MatrixUnit unit_is_ready;
        sink = unit_rounds<T>(rounds);
      } else {
        const auto a = Unit<T>::lanes(ones), b = Unit<T>::lanes(smalls);
        vf sums[kChains];
        for (int i = 0; i < kChains; ++i) sums[i] = set1(static_cast<float>(i));
        run_chains(sums, rounds, [&](vf acc) { return Unit<T>::mac(acc, a, b); });
        float total = 0.0f;
        for (const vf s : sums) total += sum(s);
        sink = total;
      }
    });
    const double operations = kHasMatrixUnit ? kUnitRoundOperations : 4.0 * W * kChains;
    return operations * static_cast<double>(rounds) * threads;
  }
  return 0.0;
}

}  // namespace

double ceiling_fma(int64_t rounds, int threads) {
  run_team(threads, [&](Team) {
    const vf a = set1(0.5f), b = set1(1e-3f);
    vf sums[kChains];
    for (int i = 0; i < kChains; ++i) sums[i] = set1(static_cast<float>(i));
    run_chains(sums, rounds, [&](vf acc) { return fma(acc, a, b); });
    float total = 0.0f;
    for (const vf s : sums) total += sum(s);
    sink = total;
  });
  return 2.0 * W * kChains * static_cast<double>(rounds) * threads;
}

double ceiling_bf16_dot(int64_t rounds, int threads) { return dot_of_two<bf16>(rounds, threads); }

double ceiling_int8_dot([[maybe_unused]] int64_t rounds, [[maybe_unused]] int threads) {
#if defined(TW_ISA_amx)
  run_team(threads, [&](Team) {
    const MatrixUnit unit_is_ready;
    sink = unit_rounds<int8_t>(rounds);
  });
  return 2.0 * kUnitRoundOperations * static_cast<double>(rounds) * threads;
#elif defined(TW_ISA_avx512_bf16)
  run_team(threads, [&](Team) {
    const vi a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
    vi sums[kChains];
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_epi32(i);
    run_chains(sums, rounds, [&](vi acc) { return _mm512_dpbusd_epi32(acc, a, b); });
    int total = 0;
    for (const vi s : sums) total ^= _mm512_reduce_add_epi32(s);
    sink = static_cast<float>(total);
  });
  return 8.0 * W * kChains * static_cast<double>(rounds) * threads;
#else
  return 0.0;
#endif
}

double ceiling_read(const float* data, int64_t n, int streams, int threads, bool* known) {
  *known = streams == 1 || streams == 2 || streams == 4 || streams == 8;
  if (!*known) return 0.0;
  double total = 0.0;
  run_team(threads, [&](Team team) {
    const int64_t begin = n * team.id / team.size, end = n * (team.id + 1) / team.size;
    float part = 0.0f;
    switch (streams) {
      case 1:
        part = sum_streams<1>(data + begin, end - begin);
        break;
      case 2:
        part = sum_streams<2>(data + begin, end - begin);
        break;
      case 4:
        part = sum_streams<4>(data + begin, end - begin);
        break;
      default:
        part = sum_streams<8>(data + begin, end - begin);
        break;
    }
#pragma omp atomic
    total += part;
  });
  return total;
}

}  // namespace tw::TW_ISA
