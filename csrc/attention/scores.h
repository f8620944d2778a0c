// What happens to a tile of scores between its product and its exponential: scale, softcap and dropout.
//
// Forward and backward leave scores as q . k and multiply by the scale where they take the exponential,
// exp(x) = 2^(log2(e) x): of a difference of two scores, so that the rounding of the factor is relative to
// the difference and not to the score.
#pragma once

#include "attention/intervals.h"
#include "common/philox.h"

namespace tw {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// top + ln(sum): in double, because a rounding here is one of every weight that the backward recomputes.
inline float log_sum_exp(double top, float sum) {
  return static_cast<float>(top + __builtin_log(static_cast<double>(sum)));
}

// exp(difference of scores), where per_unit is log2(e) times what such a score has to be multiplied by
template <int TERMS>
inline vf weight_of(vf difference, vf per_unit) {
  return exp2_of<TERMS>(mul(difference, per_unit));
}

// n scores, a multiple of W: cap tanh(score / cap times scale)
inline void apply_softcap(float* scores, int n, float cap, float scale_per_cap) {
  for (int i = 0; i < n; i += W)
    store(scores + i, mul(set1(cap), tanh_of(mul(load(scores + i), set1(scale_per_cap)))));
}

// What settled scores have yet to be multiplied by: the scale, if it does not change their order.
inline float score_unit(const Rule& rule) {
  return rule.softcap > 0 || !(rule.scale > 0) ? 1.0f : rule.scale;
}

// q . k, a tile of it -> scores in units of score_unit
template <int TILE>
inline void settle_scores(float* scores, const Rule& rule) {
  if (rule.softcap > 0)
    apply_softcap(scores, TILE * TILE, rule.softcap, rule.scale / rule.softcap);
  else if (!(rule.scale > 0))
    for (int i = 0; i < TILE * TILE; i += W) store(scores + i, mul(load(scores + i), set1(rule.scale)));
}

// factor[key j0 + r][lane]: 0 for a dropped pair, 1 / (1 - p) for a kept one. The counter is
// (key / 4, query, head_row, 0), so any tile can draw its numbers again.
template <int TILE>
inline void dropout_factors(float* factor, const Rule& rule, uint32_t head_row, int64_t first_query,
                            int64_t j0) {
  const float keep = 1.0f / (1.0f - rule.dropout_p);
  for (int r = 0; r < TILE; r += 4)
    for (int lane = 0; lane < TILE; ++lane) {
      const Philox draw(rule.dropout_seed, static_cast<uint32_t>((j0 + r) / 4),
                        static_cast<uint32_t>(first_query + lane), head_row);
      for (int w = 0; w < 4; ++w) {
        factor[(r + w) * TILE + lane] = draw.uniform(w) >= rule.dropout_p ? keep : 0.0f;
      }
    }
}

}  // namespace
}  // namespace tw
