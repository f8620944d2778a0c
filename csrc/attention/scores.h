// What happens to a tile of scores between its product and its exponential: softcap and dropout.
//
// Scores and maxima are in natural units, scale * (q . k); exp(x) is taken as 2^(log2(e) x) of a difference,
// so that the rounding of the factor log2(e) is relative to the difference and not to the score.
#pragma once

#include "attention/intervals.h"

namespace tw {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// top + ln(sum): in double, because a rounding here is one of every weight that the backward recomputes.
inline float log_sum_exp(float top, float sum) {
  return static_cast<float>(top + __builtin_log(static_cast<double>(sum)));
}

// exp(score - pivot)
template <int TERMS>
inline vf weight_of(vf score, vf pivot) {
  return exp2_of<TERMS>(mul(sub(score, pivot), set1(kLog2E)));
}

// The factor from q . k to a score; softcap wants it divided by the cap, see apply_softcap.
inline float score_scale(const Rule& rule) {
  return rule.softcap > 0 ? rule.scale / rule.softcap : rule.scale;
}

// n scores, a multiple of W: cap tanh(score)
inline void apply_softcap(float* scores, int n, float cap) {
  for (int i = 0; i < n; i += W) store(scores + i, mul(set1(cap), tanh_of(load(scores + i))));
}

// Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words from a counter and a key.
struct Philox {
  uint32_t word[4];
  Philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32), c3 = 0;
    for (int round = 0; round < 10; ++round) {
      const uint64_t wide0 = static_cast<uint64_t>(c0) * 0xD2511F53u,
                     wide2 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(wide2 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(wide2);
      c2 = static_cast<uint32_t>(wide0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(wide0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    word[0] = c0;
    word[1] = c1;
    word[2] = c2;
    word[3] = c3;
  }
};

// factor[key j0 + r][lane]: 0 for a dropped pair, 1 / (1 - p) for a kept one. The counter is
// (key / 4, query, head_row, 0), so any tile can draw its numbers again.
inline void dropout_factors(float* factor, const Rule& rule, uint32_t head_row, int64_t first_query,
                            int64_t j0) {
  const float keep = 1.0f / (1.0f - rule.dropout_p);
  for (int r = 0; r < kTile; r += 4)
    for (int lane = 0; lane < kTile; ++lane) {
      const Philox draw(rule.dropout_seed, static_cast<uint32_t>((j0 + r) / 4),
                        static_cast<uint32_t>(first_query + lane), head_row);
      for (int w = 0; w < 4; ++w) {
        const float uniform = static_cast<float>(draw.word[w] >> 8) * 0x1p-24f;
        factor[(r + w) * kTile + lane] = uniform >= rule.dropout_p ? keep : 0.0f;
      }
    }
}

}  // namespace
}  // namespace tw
