// The gated activations and their derivatives.
#pragma once

#include "common/vec.h"
#include "moe/moe.h"

namespace tw {
namespace {

// a = act(gate) up, and its derivatives.
struct Gated {
  vf a, by_gate, by_up;
};

constexpr float kLog2E = 1.44269504f;

// 1 / (1 + exp(-x))
inline vf sigmoid_of(vf x) {
  const vf e = exp2_of<6>(mul(abs(x), set1(-kLog2E)));
  const vf q = div(set1(1.0f), add(set1(1.0f), e));
  return select(lt(x, zero()), mul(e, q), q);
}

// The normal distribution's density, exp(-x^2 / 2) / sqrt(2 pi), and its integral up to x, relative error
// 3e-7: the tail beyond |x| over exp(-x^2 / 2) is a polynomial of 1 / (1 + 0.29 |x|), a least-squares fit.
inline vf normal_cdf(vf x, vf* density) {
  constexpr float kFit[] = {-1.8549606e-2f, 1.1209267e-1f, -2.5706327e-1f, 2.5749794e-1f, -1.2781894e-1f,
                            1.2473904e-1f,  6.9076635e-2f, 1.0891217e-1f,  1.1540811e-1f, 1.1570525e-1f};
  const vf t = div(set1(1.0f), fma(abs(x), set1(0.29f), set1(1.0f)));
  vf p = set1(kFit[0]);
  for (int i = 1; i < 10; ++i) p = fma(p, t, set1(kFit[i]));
  const vf e = exp2_of<6>(mul(mul(x, x), set1(-0.5f * kLog2E)));
  const vf tail = mul(mul(p, t), e);
  *density = mul(e, set1(0.39894228f));
  return select(lt(x, zero()), tail, sub(set1(1.0f), tail));
}

template <Gate GATE>
inline Gated gated(vf gate, vf up, float alpha, float limit) {
  if constexpr (GATE == Gate::swiglu) {
    const vf s = sigmoid_of(gate), act = mul(gate, s);
    // s (1 + gate (1 - s))
    const vf slope = fma(act, sub(set1(1.0f), s), s);
    return {mul(act, up), mul(up, slope), act};
  } else if constexpr (GATE == Gate::geglu) {
    vf density;
    const vf cdf = normal_cdf(gate, &density), act = mul(gate, cdf);
    return {mul(act, up), mul(up, fma(gate, density, cdf)), act};
  } else if constexpr (GATE == Gate::geglu_tanh) {
    constexpr float kRoot = 0.79788456f, kCube = 0.044715f;  // sqrt(2 / pi)
    const vf square = mul(gate, gate), half = mul(set1(0.5f), gate);
    const vf inner = mul(mul(set1(kRoot), gate), fma(set1(kCube), square, set1(1.0f)));
    const vf t = tanh_of(inner), one_more = add(set1(1.0f), t);
    const vf slope_of_inner = mul(set1(kRoot), fma(set1(3.0f * kCube), square, set1(1.0f)));
    const vf act = mul(half, one_more);
    const vf slope =
        fma(mul(half, mul(one_more, sub(set1(1.0f), t))), slope_of_inner, mul(set1(0.5f), one_more));
    return {mul(act, up), mul(up, slope), act};
  } else if constexpr (GATE == Gate::reglu) {
    const vf act = select(lt(gate, zero()), zero(), gate);  // a NaN stays
    return {mul(act, up), select(lt(zero(), gate), up, zero()), act};
  } else {
    const vf most = set1(limit), least = set1(-limit);
    // comparisons in this order keep a NaN
    const vf c = select(lt(most, gate), most, gate);
    const vf v = select(lt(most, up), most, select(lt(up, least), least, up));
    const vf s = sigmoid_of(mul(set1(alpha), c)), act = mul(c, s), more = add(v, set1(1.0f));
    const vf slope = fma(mul(set1(alpha), act), sub(set1(1.0f), s), s);
    return {mul(act, more), select(lt(most, gate), zero(), mul(more, slope)),
            select(either(lt(most, up), lt(up, least)), zero(), act)};
  }
}

// f(gate constant) for the activation of a call
template <Gate GATE>
struct GateOf {
  static constexpr Gate value = GATE;
};
template <class F>
inline void by_gate(Gate gate, const F& f) {
  switch (gate) {
    case Gate::swiglu:
      return f(GateOf<Gate::swiglu>{});
    case Gate::geglu:
      return f(GateOf<Gate::geglu>{});
    case Gate::geglu_tanh:
      return f(GateOf<Gate::geglu_tanh>{});
    case Gate::reglu:
      return f(GateOf<Gate::reglu>{});
    default:
      return f(GateOf<Gate::clamped_swiglu>{});
  }
}

// Gates and ups of W neighbours from `at` on in a row of lines.
struct GateAndUp {
  vf gate, up;
};

template <class T>
inline GateAndUp load_pair(const T* row, int64_t at, int64_t width, int some, Layout layout) {
  if (layout == Layout::alone) return {load_n(row + at, some), set1(1.0f)};
  if (layout == Layout::halves) {
    if (some == W) return {load(row + at), load(row + width + at)};
    return {load_n(row + at, some), load_n(row + width + at, some)};
  }
  float gate[W] = {}, up[W] = {};
  for (int i = 0; i < some; ++i) {
    gate[i] = to_float(row[2 * (at + i)]);
    up[i] = to_float(row[2 * (at + i) + 1]);
  }
  return {load(gate), load(up)};
}

// What is added to a pair: to the gate only, where it is alone.
template <class T>
inline GateAndUp plus_pair(GateAndUp pair, const T* row, int64_t at, int64_t width, int some, Layout layout) {
  const GateAndUp more = load_pair(row, at, width, some, layout);
  return {add(pair.gate, more.gate), layout == Layout::alone ? pair.up : add(pair.up, more.up)};
}

template <class T>
inline void store_pair(T* row, int64_t at, int64_t width, int some, Layout layout, vf gate, vf up) {
  if (layout != Layout::alternating) {
    store_n(row + at, gate, some);
    if (layout == Layout::halves) store_n(row + width + at, up, some);
    return;
  }
  float gates[W], ups[W];
  store(gates, gate);
  store(ups, up);
  for (int i = 0; i < some; ++i) {
    row[2 * (at + i)] = from_float<T>(gates[i]);
    row[2 * (at + i) + 1] = from_float<T>(ups[i]);
  }
}

}  // namespace
}  // namespace tw
