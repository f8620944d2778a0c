// A row of logits at a time, which stays in the core's cache between its passes: the largest, the sum of the
// exponentials, the gradient. Rows are dealt out to threads whole, so results do not depend on their number.
#include <math.h>

#include "common/by_dtype.h"
#include "common/extents.h"
#include "common/parallel.h"
#include "loss/loss.h"

namespace tw {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kSerialElements = 16 << 10;  // 20 microseconds of one core
constexpr int64_t kSumColumns = 64 * W;        // summed up on their own, which keeps long sums exact

// The lanes of a vector of columns: all, or the first n of the last one.
struct Whole {
  template <class T>
  vf load(const T* p) const {
    return tw::load(p);
  }
  template <class T>
  void store(T* p, vf x) const {
    tw::store(p, x);
  }
  vf or_else(vf x, float) const { return x; }
};
struct First {
  int n;
  template <class T>
  vf load(const T* p) const {
    return load_n(p, n);
  }
  template <class T>
  void store(T* p, vf x) const {
    store_n(p, x, n);
  }
  vf or_else(vf x, float rest) const {
    float lanes[W];
    tw::store(lanes, x);
    for (int i = n; i < W; ++i) lanes[i] = rest;
    return tw::load(lanes);
  }
};

template <class F>
inline void over_columns(int64_t begin, int64_t end, const F& f) {
  int64_t c = begin;
  for (; c + W <= end; c += W) f(c, Whole{});
  if (c < end) f(c, First{static_cast<int>(end - c)});
}

// The sum of f over a row; f is 0 in lanes past its end.
template <class F>
inline float sum_over(int64_t width, const F& f) {
  vf all = zero();
  for (int64_t begin = 0; begin < width; begin += kSumColumns) {
    vf part = zero();
    over_columns(begin, least(width, begin + kSumColumns),
                 [&](int64_t c, auto lanes) { part = add(part, f(c, lanes)); });
    all = add(all, part);
  }
  return sum(all);
}

// A row's logits as the loss sees them.
template <class T, bool CAPPED>
struct Row {
  const T* raw;
  const float* bias;
  float scale, cap;

  template <class Lanes>
  vf at(int64_t c, Lanes lanes) const {
    vf x = lanes.load(raw + c);
    if (bias) x = add(x, lanes.load(bias + c));
    x = mul(x, set1(scale));
    if constexpr (CAPPED) x = mul(set1(cap), tanh_of(mul(x, set1(1.0f / cap))));
    return x;
  }
  float one(int64_t c) const {
    float lanes[W];
    store(lanes, at(c, First{1}));
    return lanes[0];
  }
  // dx / dlogit
  vf slope(vf x) const {
    if constexpr (!CAPPED) return set1(scale);
    const vf part = mul(x, set1(1.0f / cap));
    return mul(set1(scale), sub(set1(1.0f), mul(part, part)));
  }
};

template <class T, bool CAPPED>
float largest_of(const Row<T, CAPPED>& row, int64_t width) {
  vf most_of = set1(-INFINITY);
  over_columns(0, width, [&](int64_t c, auto lanes) {
    most_of = max(lanes.or_else(row.at(c, lanes), -INFINITY), most_of);
  });
  float lanes[W], largest = -INFINITY;
  store(lanes, most_of);
  for (float x : lanes) largest = x > largest ? x : largest;
  return largest;
}

inline float at_or_zero(const float* p, int64_t i) { return p ? p[i] : 0.0f; }

template <class T, bool CAPPED>
void one_row(const HeadRowsCall& call, int64_t r) {
  const int64_t width = call.n_classes, n_ids = call.n_ids;
  T* raw = static_cast<T*>(call.logits.data) + r * call.logits.row;
  const Row<T, CAPPED> row = {raw, call.bias, call.scale, call.cap};
  const float* class_weight = call.class_weight;
  const vf log2e = set1(kLog2E);

  if (!call.has_stats) {
    const vf top = set1(call.largest[r] = largest_of(row, width));
    call.mass[r] = sum_over(width, [&](int64_t c, auto lanes) {
      return exp2_of<6>(mul(sub(lanes.or_else(row.at(c, lanes), -INFINITY), top), log2e));
    });
  }
  const float largest = call.largest[r], mass = call.mass[r], log_mass = logf(mass);
  const vf top = set1(largest);
  if (call.total) {
    const float relative = sum_over(width, [&](int64_t c, auto lanes) {
      const vf x = sub(row.at(c, lanes), top);
      return lanes.or_else(class_weight ? mul(x, lanes.load(class_weight + c)) : x, 0.0f);
    });
    call.total[r] = relative - call.class_weight_sum * log_mass;
  }
  const int64_t* ids = call.ids + r * n_ids;
  float* log_probs = call.log_probs + r * n_ids;
  for (int64_t k = 0; k < n_ids; ++k)
    log_probs[k] = ids[k] < 0 ? 0.0f : (row.one(ids[k]) - largest) - log_mass;
  if (!call.wants_gradient) return;

  // dx_i = for_total w_i + for_all p_i, and for_ids on top of that
  const float* for_ids = call.for_ids + r * n_ids;
  const float for_total = at_or_zero(call.for_total, r);
  float for_all = at_or_zero(call.for_lse, r) - for_total * call.class_weight_sum;
  for_all += 2.0f * at_or_zero(call.for_square, r) * (largest + log_mass);
  for (int64_t k = 0; k < n_ids; ++k)
    if (ids[k] >= 0) for_all -= for_ids[k];
  // what the entries of ids get is found from their logits, which the pass below writes over
  float* at_ids = call.at_ids + r * n_ids;
  for (int64_t k = 0; k < n_ids; ++k) {
    if (ids[k] < 0) continue;
    float g = for_all * expf(log_probs[k]) + for_total * (class_weight ? class_weight[ids[k]] : 1.0f);
    for (int64_t j = 0; j < n_ids; ++j)
      if (ids[j] == ids[k]) g += for_ids[j];
    float slope[W];
    store(slope, row.slope(set1(row.one(ids[k]))));
    at_ids[k] = g * slope[0];
  }
  const vf each = set1(for_all / mass), weighted = set1(for_total);
  over_columns(0, width, [&](int64_t c, auto lanes) {
    const vf x = row.at(c, lanes);
    vf g = mul(exp2_of<6>(mul(sub(x, top), log2e)), each);
    g = class_weight ? fma(weighted, lanes.load(class_weight + c), g) : add(weighted, g);
    lanes.store(raw + c, mul(g, row.slope(x)));
  });
  for (int64_t k = 0; k < n_ids; ++k)
    if (ids[k] >= 0) raw[ids[k]] = from_float<T>(at_ids[k]);
}

template <class T>
void rows(const HeadRowsCall& call) {
  const auto one = [&](int64_t r) {
    if (call.cap > 0.0f)
      one_row<T, true>(call, r);
    else
      one_row<T, false>(call, r);
  };
  if (call.threads <= 1 || call.n_rows <= 1 || call.n_rows * call.n_classes < kSerialElements) {
    for (int64_t r = 0; r < call.n_rows; ++r) one(r);
    return;
  }
  int64_t taken = 0;
  run_team(call.threads, [&](const Team&) {
    for (int64_t r; (r = take_next(&taken)) < call.n_rows;) one(r);
  });
}

}  // namespace

namespace TW_ISA {
void head_rows(const HeadRowsCall& call) {
  by_dtype(call.dtype, [&](auto t) {
    rows<decltype(t)>(call);
    return true;
  });
}
}  // namespace TW_ISA

}  // namespace tw
