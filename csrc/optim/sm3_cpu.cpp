// SM3 in one pass: rows are dealt out, and each thread keeps the largest of every column for itself.
#include <math.h>

#include "common/by_dtype.h"
#include "optim/chunks.h"

namespace tw {
namespace {

struct Sm3Constants {
  vf scale, lr, eps, kept;
  explicit Sm3Constants(const Sm3Call& call)
      : scale(set1(call.scale)),
        lr(set1(static_cast<float>(call.lr))),
        eps(set1(static_cast<float>(call.eps))),
        kept(set1(static_cast<float>(1.0 - call.lr * call.weight_decay))) {}
};

inline vf root_of(vf x) {
  float lanes[W];
  store(lanes, x);
  for (int l = 0; l < W; ++l) lanes[l] = sqrtf(lanes[l]);
  return load(lanes);
}

// Returns s; a gradient of 0 where nothing has been moves nothing, whatever eps.
inline vf step(const Sm3Constants& k, vf g, vf least_so_far, vf& p) {
  g = mul(g, k.scale);
  const vf s = fma(g, g, least_so_far);
  const vf below = root_of(add(s, k.eps));
  const vf moved = select(le(below, zero()), zero(), div(mul(k.lr, g), below));
  p = sub(mul(p, k.kept), moved);
  return s;
}

// NaN if either is.
inline float larger(float a, float b) { return a > b || a != a ? a : b; }
inline vf larger(vf a, vf b) { return select(le(a, a), max(a, b), a); }

inline float largest_lane(vf x, int n, float at_least) {
  float lanes[W];
  store(lanes, x);
  for (int l = 0; l < n; ++l) at_least = larger(lanes[l], at_least);
  return at_least;
}

template <class T, class G>
void whole_row(const Sm3Call& call, const Sm3Constants& k, int64_t r, float* largest) {
  T* parameter = static_cast<T*>(call.parameter) + r * call.n_columns;
  const G* gradient = static_cast<const G*>(call.gradient) + r * call.n_columns;
  const vf row = set1(call.row[r]);
  vf most_of_row = row;
  const int64_t width = call.n_columns;
  int64_t c = 0;
  for (; c + W <= width; c += W) {
    vf p = load(parameter + c);
    const vf s = step(k, load(gradient + c), min(row, load(call.column + c)), p);
    store(parameter + c, p);
    store(largest + c, larger(load(largest + c), s));
    most_of_row = larger(most_of_row, s);
  }
  call.row[r] = largest_lane(most_of_row, W, call.row[r]);
  if (c < width) {
    const int n = static_cast<int>(width - c);
    vf p = load_n(parameter + c, n);
    const vf s = step(k, load_n(gradient + c, n), min(row, load_n(call.column + c, n)), p);
    store_n(parameter + c, p, n);
    store_n(largest + c, larger(load_n(largest + c, n), s), n);
    call.row[r] = largest_lane(s, n, call.row[r]);
  }
}

template <class T, class G>
void some_of_row(const Sm3Call& call, const Sm3Constants& k, int64_t r, float* largest) {
  T* parameter = static_cast<T*>(call.parameter);
  const G* gradient = static_cast<const G*>(call.gradient);
  const uint16_t* short_columns = static_cast<const uint16_t*>(call.columns);
  const int32_t* wide_columns = static_cast<const int32_t*>(call.columns);
  const vf row = set1(call.row[r]);
  for (int64_t i = call.row_offsets[r]; i < call.row_offsets[r + 1]; i += W) {
    const int n = static_cast<int>(least(W, call.row_offsets[r + 1] - i));
    int64_t columns[W], places[W];
    float of_column[W] = {};
    T of_p[W] = {};
    G of_g[W] = {};
    for (int l = 0; l < n; ++l) {
      columns[l] = call.has_short_columns ? int64_t{short_columns[i + l]} : int64_t{wide_columns[i + l]};
      places[l] = call.is_compact ? i + l : r * call.n_columns + columns[l];
      of_column[l] = call.column[columns[l]];
      of_p[l] = parameter[places[l]];
      of_g[l] = gradient[places[l]];
    }
    vf p = load(of_p);
    const vf s = step(k, load(of_g), min(row, load(of_column)), p);
    store(of_p, p);
    float of_s[W];
    store(of_s, s);
    for (int l = 0; l < n; ++l) {
      parameter[places[l]] = of_p[l];
      largest[columns[l]] = larger(of_s[l], largest[columns[l]]);
    }
    call.row[r] = largest_lane(s, n, call.row[r]);
  }
}

template <class T, class G>
void over_all(const Sm3Call& call, float* scratch) {
  const Sm3Constants k(call);
  const int64_t cells = call.row_offsets ? call.row_offsets[call.n_rows] : call.n_rows * call.n_columns;
  const int64_t taken_rows = most(1, kChunk * call.n_rows / most(1, cells));
  const int threads = cells < kSerialEntries ? 1 : call.threads;
  const int64_t stride = round_up(call.n_columns * static_cast<int64_t>(sizeof(float)), kCacheLine) /
                         static_cast<int64_t>(sizeof(float));
  int64_t taken = 0;
  run_team(threads, [&](const Team& team) {
    float* largest = scratch + team.id * stride;
    memcpy(largest, call.column, static_cast<size_t>(call.n_columns) * sizeof(float));
    for (int64_t i; (i = take_next(&taken)) * taken_rows < call.n_rows;)
      for (int64_t r = i * taken_rows; r < least(call.n_rows, (i + 1) * taken_rows); ++r)
        if (call.row_offsets)
          some_of_row<T, G>(call, k, r, largest);
        else
          whole_row<T, G>(call, k, r, largest);
    team.barrier();  // until here the old columns are read
    const int64_t begin = call.n_columns * team.id / team.size,
                  end = call.n_columns * (team.id + 1) / team.size;
    for (int other = 0; other < team.size; ++other) {
      const float* theirs = scratch + other * stride;
      for (int64_t c = begin; c < end; ++c) call.column[c] = larger(theirs[c], call.column[c]);
    }
  });
}

}  // namespace

namespace TW_ISA {

void sm3(const Sm3Call& call, float* largest) {
  by_dtype(call.dtype, [&](auto t) {
    using T = decltype(t);
    if (call.has_wide_gradient)
      over_all<T, float>(call, largest);
    else
      over_all<T, T>(call, largest);
    return true;
  });
}

}  // namespace TW_ISA
}  // namespace tw
