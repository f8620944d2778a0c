// Gated activations, and their gradients from the gate and up that went in.
#include "common/by_dtype.h"
#include "norm/norm.h"
#include "norm/rows.h"

namespace tw {
namespace {

constexpr float kLog2E = 1.44269504f;

// The value of an activation, and with SLOPE its derivative.
struct Value {
  vf value, slope;
};

template <bool SLOPE>
inline Value silu(vf a) {
  const vf one = set1(1.0f);
  const vf e = exp2_of<6>(mul(abs(a), set1(-kLog2E)));  // exp(-|a|)
  const vf near_one = div(one, add(one, e));
  const vf sigmoid = select(lt(a, zero()), mul(e, near_one), near_one);
  const vf value = mul(a, sigmoid);
  if constexpr (!SLOPE) return {value, value};
  // sigmoid + value (1 - sigmoid), and 1 - sigmoid without cancellation
  const vf rest = select(lt(a, zero()), near_one, mul(e, near_one));
  return {value, fma(value, rest, sigmoid)};
}

// The normal distribution function: absolute error 4e-8, exactly 0 or 1 from |a| = 5.7 on.
inline vf normal_below(vf a) {
  const vf t = mul(abs(a), set1(0.70710678f)), z = mul(t, t), half = set1(0.5f);
  // t below 0.9: erf(t) = t P(t^2); fitted, as the other, by weighted least squares
  vf p = fma(set1(-6.111292415e-4f), z, set1(5.016228442e-3f));
  p = fma(p, z, set1(-2.678195695e-2f));
  p = fma(p, z, set1(1.128222996e-1f));
  p = fma(p, z, set1(-3.761253245e-1f));
  p = fma(p, z, set1(1.128379155f));
  const vf inner = fma(mul(mul(p, a), set1(0.70710678f)), half, half);
  // 0.9 to 4: log2 of 1 - erf(t)
  vf q = fma(set1(-3.016604381e-5f), t, set1(6.236806593e-4f));
  q = fma(q, t, set1(-6.002368284e-3f));
  q = fma(q, t, set1(3.619936963e-2f));
  q = fma(q, t, set1(-1.561524219e-1f));
  q = fma(q, t, set1(-9.137837842e-1f));
  q = fma(q, t, set1(-1.629517060f));
  q = fma(q, t, set1(2.460536405e-4f));
  const vf tail = select(lt(set1(4.0f), t), zero(), mul(half, exp2_of<6>(min(q, zero()))));
  const vf outer = select(lt(a, zero()), tail, sub(set1(1.0f), tail));
  return select(lt(t, set1(0.9f)), inner, outer);
}

template <bool SLOPE>
inline Value gelu(vf a) {
  const vf below = normal_below(a), value = mul(a, below);
  if constexpr (!SLOPE) return {value, value};
  const vf density = mul(exp2_of<6>(mul(mul(a, a), set1(-0.5f * kLog2E))), set1(0.39894228f));
  return {value, fma(a, density, below)};
}

template <bool SLOPE>
inline Value gelu_tanh(vf a) {
  const vf factor = set1(0.79788456f), cubic = set1(0.044715f), half = set1(0.5f), one = set1(1.0f);
  const vf z = mul(a, a);
  const vf t = tanh_of(mul(mul(factor, a), fma(cubic, z, one)));
  const vf below = fma(half, t, half), value = mul(a, below);
  if constexpr (!SLOPE) return {value, value};
  const vf inner = mul(factor, fma(mul(set1(3.0f), cubic), z, one));
  return {value, fma(mul(mul(half, a), sub(one, mul(t, t))), inner, below)};
}

template <Activation F, bool SLOPE>
inline Value activation(vf a) {
  if constexpr (F == Activation::silu) return silu<SLOPE>(a);
  if constexpr (F == Activation::gelu) return gelu<SLOPE>(a);
  return gelu_tanh<SLOPE>(a);
}

template <class T, Activation F>
void forward(const GatedCall& call) {
  over_rows(call.n_rows, 3 * call.width * static_cast<int64_t>(sizeof(T)), call.threads,
            [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) {
                const T *gate = row_of<const T>(call.gate, i), *up = row_of<const T>(call.up, i);
                T* y = row_of<T>(call.y, i);
                over_columns(call.width, [&](int64_t c, auto ld, auto st) {
                  st(y + c, mul(rounded<T>(activation<F, false>(ld(gate + c)).value), ld(up + c)));
                });
              }
            });
}

template <class T, Activation F>
void backward(const GatedCall& call) {
  over_rows(call.n_rows, 5 * call.width * static_cast<int64_t>(sizeof(T)), call.threads,
            [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) {
                const T *gate = row_of<const T>(call.gate, i), *up = row_of<const T>(call.up, i);
                const T* dy = row_of<const T>(call.y, i);
                T *dgate = row_of<T>(call.dgate, i), *dup = row_of<T>(call.dup, i);
                over_columns(call.width, [&](int64_t c, auto ld, auto st) {
                  const vf g = ld(dy + c);
                  const Value f = activation<F, true>(ld(gate + c));
                  if (dgate) st(dgate + c, mul(mul(g, ld(up + c)), f.slope));
                  if (dup) st(dup + c, mul(g, f.value));
                });
              }
            });
}

// f(T{}, constant of the activation)
template <Activation F>
struct Constant {
  static constexpr Activation value = F;
};
template <class F>
inline void by_activation(const GatedCall& call, const F& f) {
  by_dtype(call.dtype, [&](auto t) {
    switch (call.activation) {
      case Activation::silu:
        f(t, Constant<Activation::silu>{});
        break;
      case Activation::gelu:
        f(t, Constant<Activation::gelu>{});
        break;
      default:
        f(t, Constant<Activation::gelu_tanh>{});
    }
    return true;
  });
}

}  // namespace

namespace TW_ISA {

void gated_forward(const GatedCall& call) {
  by_activation(call, [&](auto t, auto f) { forward<decltype(t), decltype(f)::value>(call); });
}

void gated_backward(const GatedCall& call) {
  by_activation(call, [&](auto t, auto f) { backward<decltype(t), decltype(f)::value>(call); });
}

}  // namespace TW_ISA
}  // namespace tw
