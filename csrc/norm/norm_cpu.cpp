// RMSNorm and LayerNorm, a row at a time: what a row's second pass reads is still in the cache.
//
// Compiled without contraction of products and sums, so that each is rounded as torch rounds it.
#include <math.h>

#include "common/by_dtype.h"
#include "norm/norm.h"
#include "norm/rows.h"

namespace tw {
namespace {

constexpr int kSums = 4;  // accumulators of a row, so that additions overlap

// Adds f(column, load, store, accumulator) over the row; the value for a lane past the end must be 0.
template <class F>
inline float sum_over(int64_t width, const F& f) {
  vf acc[kSums] = {zero(), zero(), zero(), zero()};
  const auto load_all = [](auto* p) { return load(p); };
  const auto store_all = [](auto* p, vf v) { store(p, v); };
  int64_t c = 0;
  for (; c + kSums * W <= width; c += kSums * W)
    for (int i = 0; i < kSums; ++i) acc[i] = f(c + i * W, load_all, store_all, acc[i]);
  for (; c + W <= width; c += W) acc[0] = f(c, load_all, store_all, acc[0]);
  if (c < width) {
    const int n = static_cast<int>(width - c);
    acc[1] = f(c, [n](auto* p) { return load_n(p, n); }, [n](auto* p, vf v) { store_n(p, v, n); }, acc[1]);
  }
  return sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

// Lanes of a vector of columns that lie inside the row.
inline vf inside(int64_t column, int64_t width, vf x) {
  if (column + W <= width) return x;
  float lanes[W] = {};
  store_n(lanes, x, static_cast<int>(width - column));
  return load(lanes);
}

template <class T, class Weight, class Y, bool CENTRED, bool EARLY>
void forward_rows(const NormCall& call, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  const Weight* weight = static_cast<const Weight*>(call.weight);
  const Weight* bias = static_cast<const Weight*>(call.bias);
  const vf offset = set1(call.offset);
  const float n = static_cast<float>(width);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row_of<const T>(call.x, i);
    const T* residual = row_of<const T>(call.residual, i);
    T* total = row_of<T>(call.sum, i);
    Y* y = row_of<Y>(call.y, i);

    // the first pass adds the residual; later ones read the sum as it was stored
    const auto first = [&](auto add_up) {
      if (!residual)
        return sum_over(width, [&](int64_t c, auto ld, auto, vf a) { return add_up(a, ld(x + c)); });
      return sum_over(width, [&](int64_t c, auto ld, auto st, vf a) {
        const vf s = rounded<T>(add(ld(x + c), ld(residual + c)));
        st(total + c, s);
        return add_up(a, s);
      });
    };
    float mean = 0.0f, squares;
    const T* s = residual ? total : x;
    if constexpr (CENTRED) {
      mean = first([](vf a, vf v) { return add(a, v); }) / n;
      const auto centre = [&](int64_t c, auto ld) { return inside(c, width, sub(ld(s + c), set1(mean))); };
      const auto add_squares = [&] {
        return sum_over(width, [&](int64_t c, auto ld, auto, vf a) {
          const vf d = centre(c, ld);
          return fma(d, d, a);
        });
      };
      squares = add_squares();
      if (mean * mean * n > squares) {  // far from zero it matters what the rounded mean leaves
        mean += sum_over(width, [&](int64_t c, auto ld, auto, vf a) { return add(a, centre(c, ld)); }) / n;
        squares = add_squares();
      }
    } else {
      squares = first([](vf a, vf v) { return fma(v, v, a); });
    }
    const float r = 1.0f / sqrtf(squares / n + call.eps);
    if (call.rstd) call.rstd[i] = r;
    if (CENTRED && call.mean) call.mean[i] = mean;

    over_columns(width, [&](int64_t c, auto ld, auto st) {
      vf v = ld(s + c);
      if constexpr (CENTRED) v = sub(v, set1(mean));
      v = mul(v, set1(r));
      if constexpr (EARLY) v = rounded<T>(v);
      if constexpr (CENTRED) {  // without an offset
        const vf shift = bias ? ld(bias + c) : zero();
        v = weight ? fma(v, ld(weight + c), shift) : add(v, shift);
      } else if (weight) {
        v = mul(v, add(offset, ld(weight + c)));
      }
      st(y + c, v);
    });
  }
}

template <class T, class Weight, class Y>
void forward(const NormCall& call) {
  over_rows(call.n_rows, call.width * 3 * static_cast<int64_t>(sizeof(T)), call.threads,
            [&](int64_t begin, int64_t end) {
              if (call.is_centred)
                forward_rows<T, Weight, Y, true, false>(call, begin, end);
              else if (call.rounds_early)
                forward_rows<T, Weight, Y, false, true>(call, begin, end);
              else
                forward_rows<T, Weight, Y, false, false>(call, begin, end);
            });
}

// dx = r (m - mean(m) - x^ mean(m x^)) with m = dy w and x^ the normalised row; mean(m) is centred's alone.
template <class T, class Weight, class Y, bool CENTRED>
void backward_rows(const NormBackwardCall& call, float* dweight, float* dbias, int64_t begin, int64_t end) {
  const NormCall& f = call.forward;
  const int64_t width = f.width;
  const Weight* weight = static_cast<const Weight*>(f.weight);
  const vf offset = set1(f.offset);
  const float n = static_cast<float>(width);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row_of<const T>(f.x, i);
    const Y* dy = row_of<const Y>(f.y, i);
    const T* dsum = row_of<const T>(call.dsum, i);
    T* dx = row_of<T>(call.dx, i);
    const vf r = set1(f.rstd[i]), mean = set1(CENTRED ? f.mean[i] : 0.0f);
    const auto centred = [&](vf v) { return CENTRED ? sub(v, mean) : v; };
    const auto times_weight = [&](vf g, int64_t c, auto ld) {
      if (!weight) return g;
      return mul(g, CENTRED ? ld(weight + c) : add(offset, ld(weight + c)));
    };
    if (dweight || dbias)
      over_columns(width, [&](int64_t c, auto ld, auto st) {
        const vf g = ld(dy + c);
        if (dweight) st(dweight + c, fma(g, mul(centred(ld(x + c)), r), ld(dweight + c)));
        if (dbias) st(dbias + c, add(g, ld(dbias + c)));
      });
    if (!dx) continue;
    vf of_m = zero();
    const float of_product = sum_over(width, [&](int64_t c, auto ld, auto, vf a) {
      const vf m = times_weight(ld(dy + c), c, ld);  // dy is 0 past the end
      if constexpr (CENTRED) of_m = add(of_m, m);
      return fma(m, centred(ld(x + c)), a);
    });
    // r m - r mean(m) - (r^3 sum of m (x - mean) / n) (x - mean)
    const float scale = f.rstd[i];
    const vf of_x = set1(-scale * (scale * (scale * (of_product / n)))),
             rest = set1(-scale * (sum(of_m) / n));
    over_columns(width, [&](int64_t c, auto ld, auto st) {
      const vf m = times_weight(ld(dy + c), c, ld);
      vf d = mul(r, m);
      if constexpr (CENTRED) d = add(d, rest);
      d = fma(centred(ld(x + c)), of_x, d);
      if (dsum) d = add(d, ld(dsum + c));
      st(dx + c, d);
    });
  }
}

template <class T, class Weight, class Y>
void backward(const NormBackwardCall& call, int64_t n_blocks) {
  const NormCall& f = call.forward;
  const int64_t width = f.width;
  const auto rows = [&](float* dweight, float* dbias, int64_t begin, int64_t end) {
    if (f.is_centred)
      backward_rows<T, Weight, Y, true>(call, dweight, dbias, begin, end);
    else
      backward_rows<T, Weight, Y, false>(call, dweight, dbias, begin, end);
  };
  const int64_t row_bytes = width * 3 * static_cast<int64_t>(sizeof(T));
  if (!call.dweight && !call.dbias) {
    over_rows(f.n_rows, row_bytes, f.threads,
              [&](int64_t begin, int64_t end) { rows(nullptr, nullptr, begin, end); });
    return;
  }
  // sums over rows: each block's in order, then the blocks' in order
  const int64_t line = round_up(width, kCacheLine / static_cast<int64_t>(sizeof(float)));
  const int64_t per_block = (f.n_rows + n_blocks - 1) / n_blocks;
  float* weights = call.partials;
  float* biases = weights + (call.dweight ? n_blocks * line : 0);
  const bool is_small = static_cast<double>(f.n_rows) * static_cast<double>(row_bytes) < kSerialBytes;
  over_rows(n_blocks, most(row_bytes * per_block, kTakenBytes), is_small ? 1 : f.threads,
            [&](int64_t first, int64_t last) {
              for (int64_t b = first; b < last; ++b) {
                float* dweight = call.dweight ? weights + b * line : nullptr;
                float* dbias = call.dbias ? biases + b * line : nullptr;
                for (int64_t c = 0; c < width; ++c) {
                  if (dweight) dweight[c] = 0.0f;
                  if (dbias) dbias[c] = 0.0f;
                }
                rows(dweight, dbias, least(f.n_rows, b * per_block), least(f.n_rows, (b + 1) * per_block));
              }
            });
  const auto add_blocks = [&](const float* partials, float* to) {
    if (!to) return;
    over_columns(width, [&](int64_t c, auto ld, auto st) {
      vf total = zero();
      for (int64_t b = 0; b < n_blocks; ++b) total = add(total, ld(partials + b * line + c));
      st(to + c, total);
    });
  };
  add_blocks(weights, call.dweight);
  add_blocks(biases, call.dbias);
}

// f(T{}, Weight{}, Y{}) for a call's element types.
template <class F>
inline void by_types(const NormCall& call, const F& f) {
  by_dtype(call.dtype, [&](auto t) {
    using T = decltype(t);
    if (call.has_wide_y)
      f(T{}, float{}, float{});
    else if (call.has_wide_weight)
      f(T{}, float{}, T{});
    else
      f(T{}, T{}, T{});
    return true;
  });
}

}  // namespace

namespace TW_ISA {

void norm_forward(const NormCall& call) {
  by_types(call, [&](auto t, auto w, auto y) { forward<decltype(t), decltype(w), decltype(y)>(call); });
}

void norm_backward(const NormBackwardCall& call, int64_t n_blocks) {
  by_types(call.forward,
           [&](auto t, auto w, auto y) { backward<decltype(t), decltype(w), decltype(y)>(call, n_blocks); });
}

}  // namespace TW_ISA
}  // namespace tw
