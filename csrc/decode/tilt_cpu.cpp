// Sums over fused logits in one pass, in double: divergences are small differences of these sums.
#include "common/by_dtype.h"
#include "common/extents.h"
#include "common/parallel.h"
#include "decode/decode.h"

namespace tw {
namespace {

constexpr int64_t kBlock = 512;  // three arrays of doubles in the first cache
constexpr int kLanes = 8;        // sums that advance side by side
constexpr double kSerialElements = 8 << 10;
constexpr double kLeastExponent = -708.0;  // below it e^x is no normal double

// e^x for x <= 0, relative error 3e-16; about 3e-308 from kLeastExponent down. NaN stays NaN.
inline double exp_of(double x) {
  constexpr double kRound = 0x1.8p52, kLog2E = 1.4426950408889634;
  constexpr double kLn2High = 0x1.62e42fefa0000p-1, kLn2Low = 0x1.cf79abc9e3b3ap-40;
  x = x < kLeastExponent ? kLeastExponent : x;
  const double shifted = x * kLog2E + kRound, n = shifted - kRound;
  const double r = (x - n * kLn2High) - n * kLn2Low;  // within ln(2) / 2
  double p = 1.0 / 6227020800;                        // Taylor to the 13th power
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p * bits_as<double>((bits_as<int64_t>(shifted) + 1023) << 52);
}

template <class T>
inline const T* row_at(const Rows& rows, int64_t i) {
  return static_cast<const T*>(rows.data) + i * rows.row;
}

template <class T>
inline void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

template <class T>
void tilt_row(const TiltCall& call, int64_t row) {
  float base[kBlock], other[kBlock];
  double d[kBlock], x[kBlock];
  double top = -__builtin_inf(), sums[3][kLanes] = {};  // of w, w d, w d^2 with w = exp(x - top)
  for (int64_t begin = 0; begin < call.vocabulary; begin += kBlock) {
    const int64_t n = least(kBlock, call.vocabulary - begin), whole = round_up(n, kLanes);
    widen(row_at<T>(call.base, row) + begin, n, base);
    for (int64_t i = 0; i < whole; ++i) d[i] = 0.0;
    for (int64_t t = 0; t < call.n_experts; ++t) {
      const double a = call.a[row * call.n_experts + t];
      if (a == 0.0) continue;
      widen(row_at<T>(call.tuned[t], row) + begin, n, other);
      for (int64_t i = 0; i < n; ++i)
        d[i] += a * (static_cast<double>(other[i]) - static_cast<double>(base[i]));
    }
    widen(row_at<T>(call.large, row) + begin, n, other);
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<double>(other[i]) + d[i];
    for (int64_t i = n; i < whole; ++i) x[i] = -__builtin_inf();

    double most[kLanes];
    for (int j = 0; j < kLanes; ++j) most[j] = x[j];
    for (int64_t i = kLanes; i < whole; i += kLanes)
      for (int j = 0; j < kLanes; ++j) most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
    double here = most[0];
    for (int j = 1; j < kLanes; ++j) here = most[j] > here ? most[j] : here;
    if (here > top) {
      const double shrink = exp_of(top - here);
      for (auto& each : sums)
        for (double& lane : each) lane *= shrink;
      top = here;
    }
    for (int64_t i = 0; i < whole; ++i) x[i] = exp_of(x[i] - top);
    for (int64_t i = 0; i < whole; i += kLanes)
      for (int j = 0; j < kLanes; ++j) {
        const double w = x[i + j], wd = w * d[i + j];
        sums[0][j] += w;
        sums[1][j] += wd;
        sums[2][j] += wd * d[i + j];
      }
  }
  double total[3] = {};
  for (int k = 0; k < 3; ++k)
    for (int j = 0; j < kLanes; ++j) total[k] += sums[k][j];
  double* to = call.sums + 3 * row;
  const double mean = total[1] / total[0];
  to[0] = top + __builtin_log(total[0]);
  to[1] = mean;
  to[2] = total[2] / total[0] - mean * mean;
}

}  // namespace

namespace TW_ISA {

void tilt(const TiltCall& call) {
  const double elements = static_cast<double>(call.n_rows) * static_cast<double>(call.vocabulary);
  int64_t taken = 0;
  run_team(call.n_rows == 1 || elements < kSerialElements ? 1 : call.threads, [&](const Team&) {
    for (int64_t row; (row = take_next(&taken)) < call.n_rows;)
      by_dtype(call.dtype, [&](auto t) {
        tilt_row<decltype(t)>(call, row);
        return true;
      });
  });
}

}  // namespace TW_ISA
}  // namespace tw
