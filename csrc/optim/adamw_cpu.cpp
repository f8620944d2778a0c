// AdamW in one pass: what a step reads is read once and what it changes is written once.
#include <math.h>

#include "common/by_dtype.h"
#include "optim/chunks.h"
#include "optim/state_codes.h"

namespace tw {
namespace {

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

inline vf root_of(vf x) {
  float lanes[W];
  store(lanes, x);
  for (int l = 0; l < W; ++l) lanes[l] = sqrtf(lanes[l]);
  return load(lanes);
}

struct Constants {
  vf scale, one_less_beta1, beta2, one_less_beta2, eps, kept;  // kept: 1 - lr decay
  explicit Constants(const AdamwCall& call)
      : scale(set1(call.scale)),
        one_less_beta1(set1(static_cast<float>(1.0 - call.beta1))),
        beta2(set1(static_cast<float>(call.beta2))),
        one_less_beta2(set1(static_cast<float>(1.0 - call.beta2))),
        eps(set1(static_cast<float>(call.eps))),
        kept(set1(static_cast<float>(1.0 - call.lr * call.weight_decay))) {}
};

// p, m and v after the step; rate = lr / (1 - beta1^age), inverse = 1 / sqrt(1 - beta2^age).
inline void step(const Constants& k, vf g, vf rate, vf inverse, vf& p, vf& m, vf& v) {
  g = mul(g, k.scale);
  m = fma(k.one_less_beta1, sub(g, m), m);
  v = fma(mul(k.one_less_beta2, g), g, mul(k.beta2, v));
  const vf below = fma(root_of(v), inverse, k.eps);
  p = sub(mul(p, k.kept), div(mul(rate, m), below));
}

// All entries of a tensor whose entries are of one age.
template <class T, class G>
void update_plain(const Constants& k, const AdamwItem& item, float* mean, float* square, vf rate, vf inverse,
                  int64_t begin, int64_t end) {
  T* parameter = static_cast<T*>(item.parameter);
  const G* gradient = static_cast<const G*>(item.gradient);
  int64_t i = begin;
  for (; i + W <= end; i += W) {
    vf p = load(parameter + i), m = load(mean + i), v = load(square + i);
    step(k, load(gradient + i), rate, inverse, p, m, v);
    store(parameter + i, p);
    store(mean + i, m);
    store(square + i, v);
  }
  if (i < end) {
    const int n = static_cast<int>(end - i);
    vf p = load_n(parameter + i, n), m = load_n(mean + i, n), v = load_n(square + i, n);
    step(k, load_n(gradient + i, n), rate, inverse, p, m, v);
    store_n(parameter + i, p, n);
    store_n(mean + i, m, n);
    store_n(square + i, v, n);
  }
}

// A bijection of 32 bits that leaves no trace of a counter: multiply, fold, twice.
inline uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// x to bf16, up with the probability of what is cut off; infinities and NaN as ever.
inline bf16 stochastic(float x, uint32_t random) {
  const uint32_t u = bits_as<uint32_t>(x);
  if ((u & 0x7f800000u) == 0x7f800000u) return from_float<bf16>(x);
  return {static_cast<uint16_t>((u + (random & 0xffffu)) >> 16)};
}

// to[l] = entry `first` + l at age ages[l]
inline void round_lanes(bf16* to, const float* x, uint32_t key, int64_t first, const uint32_t* ages) {
  const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
  for (int l = 0; l < W; ++l) {
    const uint32_t entry = mixed((low + static_cast<uint32_t>(l)) ^ key);
    to[l] = stochastic(x[l], mixed(entry + 0x9e3779b9u * ages[l] + 0x85ebca6bu * high));
  }
}

// (1 / (1 - beta1^age) times lr, 1 / sqrt(1 - beta2^age))
struct Correction {
  float rate, inverse;
};
inline Correction correction_at(const AdamwCall& call, const AdamwPlan& plan, int32_t age) {
  if (age >= plan.n_ages && !plan.is_settled)
    return {static_cast<float>(call.lr / (1.0 - pow(call.beta1, age))),
            static_cast<float>(1.0 / sqrt(1.0 - pow(call.beta2, age)))};
  const float* both = plan.by_age + 2 * most(1, least(age, plan.n_ages - 1));
  return {static_cast<float>(call.lr) * both[0], both[1]};
}

// Makes the ages of `n` lanes one step older; whether they agree.
inline bool grow_older(int32_t* ages, int n) {
  const int32_t first = ages[0];
  int32_t differ = 0;
  if (n == W) {
    for (int l = 0; l < W; ++l) {
      differ |= ages[l] ^ first;
      ages[l] += 1;
    }
  } else {
    for (int l = 0; l < n; ++l) {
      differ |= ages[l] ^ first;
      ages[l] += 1;
    }
  }
  return differ == 0;
}

// What entries of mixed ages are corrected by, lane by lane.
struct LaneCorrections {
  int32_t age = 0;  // of the last vector whose lanes agreed
  vf rate = zero(), inverse = zero();

  void take(const AdamwCall& call, const AdamwPlan& plan, int32_t* ages, int n) {
    if (grow_older(ages, n)) {  // as where nothing has come or gone for a while
      if (ages[0] == age) return;
      const Correction same = correction_at(call, plan, ages[0]);
      rate = set1(same.rate);
      inverse = set1(same.inverse);
      age = ages[0];
      return;
    }
    float of_rate[W] = {}, of_inverse[W] = {};
    for (int l = 0; l < n; ++l) {
      const Correction its = correction_at(call, plan, ages[l]);
      of_rate[l] = its.rate;
      of_inverse[l] = its.inverse;
    }
    rate = load(of_rate);
    inverse = load(of_inverse);
    age = 0;
  }
};

template <class T>
inline vf load_some(const T* p, int n) {
  return n == W ? load(p) : load_n(p, n);
}
template <class T>
inline void store_some(T* p, vf x, int n) {
  if (n == W)
    store(p, x);
  else
    store_n(p, x, n);
}

// What update_plain leaves out as well: ages, places, float masters, rounding at random. mean and square are
// those of entry `begin`.
template <class T, class G>
void update_any(const AdamwCall& call, const AdamwPlan& plan, const Constants& k, int64_t number, float* mean,
                float* square, int64_t begin, int64_t end) {
  const AdamwItem& item = call.items[number];
  T* parameter = static_cast<T*>(item.parameter);
  const G* gradient = static_cast<const G*>(item.gradient);
  const int32_t* narrow_places = static_cast<const int32_t*>(item.places);
  const int64_t* wide_places = static_cast<const int64_t*>(item.places);
  const bool is_stochastic = call.narrow == Narrow::stochastic;
  LaneCorrections corrected;
  if (!item.ages) {
    corrected.rate = set1(plan.corrections[2 * number]);
    corrected.inverse = set1(plan.corrections[2 * number + 1]);
  }
  uint32_t ages[W];
  for (int l = 0; l < W; ++l) ages[l] = item.step ? static_cast<uint32_t>(*item.step) : 0;
  for (int64_t i = begin; i < end; i += W) {
    const int n = static_cast<int>(least(W, end - i));
    if (item.ages) {
      corrected.take(call, plan, item.ages + i, n);
      if (is_stochastic)
        for (int l = 0; l < n; ++l) ages[l] = static_cast<uint32_t>(item.ages[i + l]);
    }
    int64_t places[W];
    T of_p[W] = {};
    G of_g[W] = {};
    if (item.places) {
      for (int l = 0; l < n; ++l) {
        places[l] = call.has_wide_places ? wide_places[i + l] : narrow_places[i + l];
        of_p[l] = parameter[places[l]];
        of_g[l] = gradient[places[l]];
      }
    }
    vf p = item.master   ? load_some(item.master + i, n)
           : item.places ? load(of_p)
                         : load_some(parameter + i, n);
    vf m = load_some(mean + i - begin, n), v = load_some(square + i - begin, n);
    step(k, item.places ? load(of_g) : load_some(gradient + i, n), corrected.rate, corrected.inverse, p, m,
         v);
    store_some(mean + i - begin, m, n);
    store_some(square + i - begin, v, n);
    if (item.master) store_some(item.master + i, p, n);

    if (!item.places && !is_stochastic) {
      store_some(parameter + i, p, n);
      continue;
    }
    store(of_p, p);
    if constexpr (is_same<T, bf16>) {
      if (is_stochastic) {
        float exact[W];
        store(exact, p);
        round_lanes(of_p, exact, item.key, i, ages);
      }
    }
    if (item.places) {
      for (int l = 0; l < n; ++l) parameter[places[l]] = of_p[l];
    } else {
      memcpy(parameter + i, of_p, static_cast<size_t>(n) * sizeof(T));
    }
  }
}

template <class T, class G>
void update(const AdamwCall& call, const AdamwPlan& plan, const Constants& k, int64_t number, float* mean,
            float* square, int64_t begin, int64_t end) {
  const AdamwItem& item = call.items[number];
  if (item.ages || item.places || item.master || call.narrow != Narrow::nearest)
    return update_any<T, G>(call, plan, k, number, mean, square, begin, end);
  update_plain<T, G>(k, item, mean - begin, square - begin, set1(plan.corrections[2 * number]),
                     set1(plan.corrections[2 * number + 1]), begin, end);
}

template <class T, class G>
void over_all(const AdamwCall& call, const AdamwPlan& plan) {
  const Constants k(call);
  over_chunks([&](int64_t i) { return call.items[i].n; }, plan.first_chunks, call.n_items, call.threads,
              [&](int64_t number, int64_t begin, int64_t end, int64_t) {
                const AdamwState& state = call.items[number].state;
                if (!state.mean_codes) {
                  update<T, G>(call, plan, k, number, state.mean + begin, state.square + begin, begin, end);
                  return;
                }
                for (int64_t b = begin; b < end; b += kStateBlock) {
                  float mean[kStateBlock], square[kStateBlock];
                  const int n = static_cast<int>(least(kStateBlock, end - b));
                  float *mean_scale = state.mean_scales + b / kStateBlock,
                        *square_scale = state.square_scales + b / kStateBlock;
                  read_means(state.mean_codes + b, *mean_scale, mean, n);
                  read_squares(state.square_codes + b, *square_scale, square, n);
                  update<T, G>(call, plan, k, number, mean, square, b, b + n);
                  *mean_scale = write_means(mean, state.mean_codes + b, n);
                  *square_scale = write_squares(square, state.square_codes + b, n);
                }
              });
}

}  // namespace

namespace TW_ISA {

void adamw(const AdamwCall& call, const AdamwPlan& plan) {
  by_dtype(call.dtype, [&](auto t) {
    using T = decltype(t);
    if (call.has_wide_gradient)
      over_all<T, float>(call, plan);
    else
      over_all<T, T>(call, plan);
    return true;
  });
}

}  // namespace TW_ISA
}  // namespace tw
