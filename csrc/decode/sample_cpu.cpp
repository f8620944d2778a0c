// A token from a row of logits. The vocabulary is never sorted: thresholds are found by descending through
// the digits of the logits' bit patterns, and one random number picks from the weights that are left.
#include <string.h>

#include "common/by_dtype.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "decode/decode.h"
#include "decode/row.h"

namespace tw {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 3.402823466e38f;
constexpr double kLog2E = 1.4426950408889634;
constexpr double kMostSteepness = 1e30;  // of 1 / temperature
constexpr int64_t kBlock = 256;          // weights added up in float, 64 to a lane at most
constexpr double kSerialElements = 16 << 10;
constexpr uint32_t kHasOccurred = 1u << 31;
constexpr int kDigits = 2048;

// Ordered as the floats are; x is not -0.
inline uint32_t ordered_key(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  return u >> 31 ? ~u : u | 0x80000000u;
}

// The logits as floats, padded with -inf to whole vectors; false for NaN and +inf.
template <class T>
bool read_row(const T* from, int64_t n, float* x) {
  vf strange = zero();
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf v = add(load(from + i), zero());  // -0 becomes 0
    strange = select(le(v, set1(kLargest)), strange, set1(1.0f));
    store(x + i, v);
  }
  bool is_right = sum(strange) == 0.0f;
  for (; i < n; ++i) {
    x[i] = to_float(from[i]) + 0.0f;
    is_right = is_right && x[i] <= kLargest;
  }
  for (; i < round_up(n, kPad); ++i) x[i] = -kInfinity;
  return is_right;
}

// x of a multiple of W elements.
float largest(const float* x, int64_t n) {
  vf m = set1(-kInfinity);
  for (int64_t i = 0; i < n; i += W) m = max(load(x + i), m);
  float lanes[W], best = -kInfinity;
  store(lanes, m);
  for (int i = 0; i < W; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

int64_t first_of(const float* x, int64_t n, float value) {
  int64_t i = 0;
  while (i + W < n && !any(le(set1(value), load(x + i)))) i += W;
  while (i + 1 < n && x[i] < value) ++i;
  return i;
}

void penalize(const SampleCall& call, int64_t row, uint32_t* counts, float* x) {
  const SampleRule& rule = call.rules[row];
  const int64_t* prompt = call.prompt + row * call.n_prompt;
  const int64_t* output = call.output + row * call.n_output;
  for (int64_t i = 0; i < call.n_prompt; ++i)
    if (prompt[i] >= 0) counts[prompt[i]] |= kHasOccurred;
  for (int64_t i = 0; i < call.n_output; ++i)
    if (output[i] >= 0) counts[output[i]] = (counts[output[i]] + 1) | kHasOccurred;
  const auto change = [&](int64_t id) {
    if (id < 0 || counts[id] == 0) return;  // or changed before
    const uint32_t count = counts[id] & ~kHasOccurred;
    counts[id] = 0;
    const double old = x[id];
    double changed = old < 0 ? old * rule.repetition : old / rule.repetition;
    if (count) changed -= rule.frequency * count + rule.presence;
    x[id] = static_cast<float>(changed) + 0.0f;
  };
  for (int64_t i = 0; i < call.n_prompt; ++i) change(prompt[i]);
  for (int64_t i = 0; i < call.n_output; ++i) change(output[i]);
}

// exp((x - top) / temperature), with steepness log2(e) / temperature; returns their sum. n is of whole
// vectors.
double weigh(const float* x, int64_t n, float top, float steepness, float* weight) {
  const vf m = set1(top), c = set1(steepness);
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = least(n, begin + kBlock);
    vf s = zero();
    for (int64_t i = begin; i < end; i += W) {
      const vf w = exp2_of<6>(mul(sub(load(x + i), m), c));
      if (weight) store(weight + i, w);
      s = add(s, w);
    }
    total += static_cast<double>(sum(s));
  }
  return total;
}

// Where a walk down from the largest reaches `target`.
struct Crossing {
  uint32_t key;
  double above;  // what all larger ones make up
  int64_t n_ties;
  float weight;  // of one of them
};

// Walks down in weights, or in numbers of tokens where `weight` is null. What weighs less than `least_weight`
// is left out. 11, 11 and 10 bits of the keys are decided on in turn.
Crossing descend(const float* x, const float* weight, int64_t n, double target, float least_weight,
                 const RowScratch& s) {
  double part[kDigits];
  int64_t left = 0;
  memset(part, 0, sizeof(part));
  const auto enter = [&](int64_t i) {
    const uint32_t key = ordered_key(x[i]);
    const float w = weight ? weight[i] : 1.0f;
    s.key[left] = key;
    s.mass[left++] = w;
    part[key >> 21] += static_cast<double>(w);
  };
  if (weight) {
    const vf threshold = set1(least_weight);
    for (int64_t i = 0; i < n; i += W) {
      if (!any(le(threshold, load(weight + i)))) continue;
      for (int64_t j = i; j < least(n, i + W); ++j)
        if (weight[j] >= least_weight) enter(j);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) enter(i);
  }
  double above = 0.0;
  for (int shift = 21, bits = 11; shift >= 0;) {
    int at = (1 << bits) - 1, found = -1;
    double before = above;
    for (; at >= 0; --at) {
      if (part[at] == 0.0) continue;
      found = at;
      before = above;
      if (above + part[at] >= target) break;
      above += part[at];
    }
    above = before;  // if the sum stays below by rounding, the last digit that occurs
    const uint32_t digit = static_cast<uint32_t>(found), mask = (1u << bits) - 1u;
    const int next_bits = shift == 21 ? 11 : 10, next_shift = shift - next_bits;
    const bool is_last = shift == 0;
    int64_t kept = 0;
    memset(part, 0, sizeof(part));
    for (int64_t i = 0; i < left; ++i) {
      if ((s.key[i] >> shift & mask) != digit) continue;
      s.key[kept] = s.key[i];
      s.mass[kept++] = s.mass[i];
      if (!is_last) part[s.key[i] >> next_shift & ((1u << next_bits) - 1u)] += static_cast<double>(s.mass[i]);
    }
    left = kept;
    if (is_last) break;
    shift = next_shift;
    bits = next_bits;
  }
  return {s.key[0], above, left, s.mass[0]};
}

// Keeps the tokens from `key` on up, in their order, padded with -inf.
int64_t keep_from(uint32_t key, int64_t n, const RowScratch& s) {
  int64_t left = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (ordered_key(s.x[i]) < key) continue;
    s.x[left] = s.x[i];
    s.index[left++] = static_cast<int32_t>(i);
  }
  for (int64_t i = left; i < round_up(left, kPad); ++i) s.x[i] = -kInfinity;
  return left;
}

// Weighs nothing what the fewest largest that make up `share` of `total` do without; of equals the first
// stay.
void keep_share(double share, double total, int64_t n, const RowScratch& s) {
  const double target = share * total;
  // all below this weight together make up less than what may go
  const float least_weight = static_cast<float>(0.999 * (total - target) / static_cast<double>(n));
  const Crossing c = descend(s.x, s.weight, n, target, least_weight, s);
  int64_t ties = 1;
  while (ties < c.n_ties && c.above + static_cast<double>(ties) * static_cast<double>(c.weight) < target)
    ++ties;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = ordered_key(s.x[i]);
    if (key < c.key || (key == c.key && ties-- <= 0)) s.weight[i] = 0.0f;
  }
}

// The place where the sum of the weights passes `uniform` of it. n is of whole vectors.
int64_t pick(const float* weight, int64_t n, double uniform) {
  const auto sum_of = [&](int64_t begin) {
    vf s = zero();
    for (int64_t i = begin; i < least(n, begin + kBlock); i += W) s = add(s, load(weight + i));
    return static_cast<double>(sum(s));
  };
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) total += sum_of(begin);
  const double target = uniform * total;
  double so_far = 0.0;
  int64_t last = 0;  // that weighs anything
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const double here = sum_of(begin);
    if (here == 0.0) continue;
    const bool is_passed = so_far + here > target;
    double within = so_far;
    for (int64_t i = begin; i < least(n, begin + kBlock); ++i) {
      if (weight[i] == 0.0f) continue;
      last = i;
      within += static_cast<double>(weight[i]);
      if (is_passed && within > target) return i;
    }
    if (is_passed) return last;  // the block's sum was rounded up
    so_far += here;
  }
  return last;
}

double uniform_of(const SampleChoice& choice) {
  const uint64_t step = static_cast<uint64_t>(choice.step);
  const Philox drawn(static_cast<uint64_t>(choice.seed), static_cast<uint32_t>(step),
                     static_cast<uint32_t>(step >> 32), 0);
  return (static_cast<double>(drawn.word[0] >> 5) * 0x1p26 + static_cast<double>(drawn.word[1] >> 6)) *
         0x1p-53;
}

template <class T>
int64_t sample_row(const SampleCall& call, int64_t row, const RowScratch& s) {
  const SampleRule& rule = call.rules[row];
  const SampleChoice& choice = call.choices[row];
  const bool is_greedy = rule.temperature == 0.0;
  const int64_t all = call.vocabulary;
  int64_t n = all;
  if (!read_row(static_cast<const T*>(call.logits.data) + row * call.logits.row, n, s.x)) return -1;
  if (call.n_prompt + call.n_output) penalize(call, row, s.counts, s.x);
  const float top = largest(s.x, round_up(n, kPad));
  if (top == -kInfinity || !(top <= kLargest)) return -1;
  const double inverse = is_greedy ? 1.0 : 1.0 / rule.temperature;
  const float steepness = static_cast<float>(kLog2E * (inverse < kMostSteepness ? inverse : kMostSteepness));

  double total = 0.0;  // before the filters
  const bool has_top_k = !is_greedy && choice.top_k > 0 && choice.top_k < n;
  const auto logprob = [&](float x) {
    if (call.logprobs)
      call.logprobs[row] = static_cast<float>((static_cast<double>(x) - static_cast<double>(top)) * inverse -
                                              __builtin_log(total));
  };
  if (is_greedy) {
    if (call.logprobs) total = weigh(s.x, round_up(n, kPad), top, steepness, nullptr);
    logprob(top);
    return first_of(s.x, n, top);
  }
  if (has_top_k) {
    if (call.logprobs) total = weigh(s.x, round_up(n, kPad), top, steepness, nullptr);
    const double k = static_cast<double>(choice.top_k);
    n = keep_from(descend(s.x, nullptr, n, k, 0.0f, s).key, n, s);
  }
  const double left = weigh(s.x, round_up(n, kPad), top, steepness, s.weight);
  if (!has_top_k) total = left;
  if (rule.top_p < 1.0) keep_share(rule.top_p, left, n, s);
  if (rule.min_p > 0.0)
    for (int64_t i = 0; i < n; ++i)
      if (static_cast<double>(s.weight[i]) < rule.min_p) s.weight[i] = 0.0f;
  const int64_t place = pick(s.weight, round_up(n, kPad), uniform_of(choice));
  logprob(s.x[place]);
  return has_top_k ? s.index[place] : place;
}

}  // namespace

namespace TW_ISA {

void sample_tokens(const SampleCall& call) {
  const double elements = static_cast<double>(call.n_rows) * static_cast<double>(call.vocabulary);
  int64_t taken = 0;
  run_team(elements < kSerialElements ? 1 : call.threads, [&](const Team& team) {
    Arena arena{call.scratch + team.id * call.row_bytes};
    const RowScratch s = RowScratch::take(&arena, call.vocabulary);
    if (call.n_prompt + call.n_output)
      memset(s.counts, 0, static_cast<size_t>(call.vocabulary) * sizeof(uint32_t));
    for (int64_t row; (row = take_next(&taken)) < call.n_rows;)
      by_dtype(call.dtype, [&](auto t) {
        call.tokens[row] = sample_row<decltype(t)>(call, row, s);
        return true;
      });
  });
}

}  // namespace TW_ISA
}  // namespace tw
