// Products with a sparse matrix by themselves: D x of a few tokens, and the entries of dy^T x at D's places.
#include "common/by_dtype.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "linear/delta.h"

namespace tw {
namespace {

constexpr int64_t kRowsAtOnce = 64;  // of D, that a thread takes
constexpr int kRunningSums = 4;      // that hide the latency of an addition

// --- D x of a few tokens ---

// One token after another: up to two of them, a row of D is a list of numbers to look up.
template <class T>
void add_up_tokens(const LinearCall& call, const T* x, int64_t row, int64_t n_rows, float* sums) {
  with_delta_types(call.delta, [&](const auto* columns, const auto* values) {
    for (int64_t t = 0; t < call.tokens; ++t)
      for (int64_t o = row; o < row + n_rows; ++o) {
        const T* of_token = x + t * call.in_features;
        const int64_t end = call.delta.offsets[o + 1];
        float parts[kRunningSums] = {};
        int64_t n = call.delta.offsets[o];
        for (; n + kRunningSums <= end; n += kRunningSums)
#pragma GCC unroll 4
          for (int i = 0; i < kRunningSums; ++i)
            parts[i] += to_float(values[n + i]) * to_float(of_token[columns[n + i]]);
        for (; n < end; ++n) parts[0] += to_float(values[n]) * to_float(of_token[columns[n]]);
        sums[t * call.out_features + o] = (parts[0] + parts[2]) + (parts[1] + parts[3]);
      }
  });
}

// Tokens in lanes: x is turned, VECTORS of them for each column.
template <int VECTORS>
void add_up_lanes(const LinearCall& call, const float* x, int64_t row, int64_t n_rows, float* sums) {
  with_delta_types(call.delta, [&](const auto* columns, const auto* values) {
    for (int64_t o = row; o < row + n_rows; o += W) {
      vf squares[VECTORS][W];
      for (int i = 0; i < W; ++i) {
        vf even[VECTORS], odd[VECTORS];
        for (int v = 0; v < VECTORS; ++v) even[v] = odd[v] = zero();
        const bool exists = o + i < row + n_rows;
        int64_t n = exists ? call.delta.offsets[o + i] : 0;
        const int64_t end = exists ? call.delta.offsets[o + i + 1] : 0;
        const auto add_entry = [&](vf(&to)[VECTORS], int64_t at) {
          const float* column = x + static_cast<int64_t>(columns[at]) * VECTORS * W;
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v)
            to[v] = fma(set1(to_float(values[at])), load(column + v * W), to[v]);
        };
        for (; n + 1 < end; n += 2) {
          add_entry(even, n);
          add_entry(odd, n + 1);
        }
        if (n < end) add_entry(even, n);
        for (int v = 0; v < VECTORS; ++v) squares[v][i] = add(even[v], odd[v]);
      }
      const int some = static_cast<int>(least(W, row + n_rows - o));
      for (int v = 0; v < VECTORS; ++v) {
        transpose(squares[v]);
        for (int t = 0; t < W && v * W + t < call.tokens; ++t)
          store_n(sums + (v * W + t) * call.out_features + o, squares[v][t], some);
      }
    }
  });
}

template <class T>
bool delta_of_few(const LinearCall& call, float* sums) {
  const int64_t n = call.delta.offsets[call.out_features], n_in = call.in_features;
  const bool in_lanes = call.tokens > 2;
  int vectors = 1;
  while (vectors * W < call.tokens) vectors *= 2;
  const int64_t ld = vectors * W;
  float* x = reinterpret_cast<float*>(
      take_workspace((in_lanes ? ld : call.tokens) * most(n_in, 1) * static_cast<int64_t>(sizeof(float))));
  if (!x) return false;
  if (in_lanes)
    turn_rows(x, ld, row_at<T>(call.delta_x, 0, 0), call.delta_x.row, call.tokens, n_in);
  else
    for (int64_t t = 0; t < call.tokens; ++t)
      for (int64_t i = 0; i < n_in; i += W) {
        const int some = static_cast<int>(least(W, n_in - i));
        store_n(x + t * n_in + i, load_n(row_at<T>(call.delta_x, t, i), some), some);
      }
  int64_t taken = 0;
  const double flops = 2.0 * static_cast<double>(n) * static_cast<double>(call.tokens);
  run_team(flops < kSerialFlops ? 1 : call.threads, [&](const Team&) {
    for (int64_t row; (row = take_next(&taken) * kRowsAtOnce) < call.out_features;) {
      const int64_t n_rows = least(kRowsAtOnce, call.out_features - row);
      if (!in_lanes)
        add_up_tokens(call, x, row, n_rows, sums);
      else if (vectors == 1)
        add_up_lanes<1>(call, x, row, n_rows, sums);
      else if (vectors == 2)
        add_up_lanes<2>(call, x, row, n_rows, sums);
      else
        add_up_lanes<4>(call, x, row, n_rows, sums);
    }
  });
  give_workspace(reinterpret_cast<char*>(x));
  return true;
}

// --- entries of dy^T x ---

constexpr int64_t kTurnedBytes = int64_t{512} << 10;  // of x at once: half of a second-level cache
constexpr int64_t kLeastTokens = 64, kMostTokens = 512;

// Tokens whose products are summed up before they meet the sums of those before: a matter of shape alone.
template <class C>
int64_t tokens_at_once(const SampledCall& call) {
  constexpr int64_t kStep = W * Unit<C>::kDepth;
  const int64_t fit = kTurnedBytes / static_cast<int64_t>(sizeof(C)) / most(call.in_features, 1);
  return round_up(least(call.tokens, least(kMostTokens, most(kLeastTokens, fit))), kStep);
}

// products[n] (+)= dy[o] . x[column of n] over `depth` tokens, for the places of one row
template <class C, class Column>
void sample_row(const C* dy, const C* x, int64_t depth, const Column* columns, int64_t begin, int64_t end,
                bool is_first, float* products) {
  constexpr int64_t kStep = W * Unit<C>::kDepth;
  for (int64_t n = begin; n < end; n += W) {
    vf dots[W];
    for (int i = 0; i < W; i += kRunningSums) {
      const C* at[kRunningSums];
      vf sums[kRunningSums];
#pragma GCC unroll 4
      for (int j = 0; j < kRunningSums; ++j) {
        at[j] = x + static_cast<int64_t>(columns[least(n + i + j, end - 1)]) * depth;
        sums[j] = zero();
      }
      for (int64_t t = 0; t < depth; t += kStep) {
        const auto of_dy = Unit<C>::lanes(dy + t);
#pragma GCC unroll 4
        for (int j = 0; j < kRunningSums; ++j)
          sums[j] = Unit<C>::mac(sums[j], of_dy, Unit<C>::lanes(at[j] + t));
      }
#pragma GCC unroll 4
      for (int j = 0; j < kRunningSums; ++j) dots[i + j] = sums[j];
    }
    const int some = static_cast<int>(least(W, end - n));
    const vf found = sum_each(dots);
    store_n(products + n, is_first ? found : add(load_n(products + n, some), found), some);
  }
}

template <class T>
bool sampled(const SampledCall& call) {
  using C = typename ComputeType<T>::type;
  const int64_t n_in = call.in_features, n_out = call.out_features, n = call.at.offsets[n_out];
  if (call.tokens == 0) {
    fill_zero(call.products, n);
    return true;
  }
  const int64_t depth = tokens_at_once<C>(call);
  C *x = nullptr, *dy = nullptr;
  const auto lay_out = [&](char* base) {
    Arena arena{base};
    x = arena.take<C>(depth * n_in);
    dy = arena.take<C>(depth * n_out);
    return arena.at - base;
  };
  char* workspace = take_workspace(lay_out(nullptr));
  if (!workspace) return false;
  lay_out(workspace);
  const double flops = 2.0 * static_cast<double>(n) * static_cast<double>(call.tokens);
  const int64_t of_x = (n_in + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t of_both = of_x + (n_out + kRowsAtOnce - 1) / kRowsAtOnce;
  int64_t pieces_taken = 0, rows_taken = 0;
  run_team(flops < kSerialFlops ? 1 : call.threads, [&](const Team& team) {
    for (int64_t t0 = 0; t0 < call.tokens; t0 += depth) {
      const int64_t n_tokens = least(depth, call.tokens - t0);
      for (int64_t piece; (piece = take_next(&pieces_taken)) < of_both;) {
        const bool is_x = piece < of_x;
        const int64_t c = (is_x ? piece : piece - of_x) * kRowsAtOnce;
        const Rows& from = is_x ? call.x : call.dy;
        turn_rows((is_x ? x : dy) + c * depth, depth, row_at<T>(from, t0, c), from.row, n_tokens,
                  least(kRowsAtOnce, (is_x ? n_in : n_out) - c));
      }
      team.barrier();
      for (int64_t row; (row = take_next(&rows_taken) * kRowsAtOnce) < n_out;)
        with_delta_types(call.at, [&](const auto* columns, const auto*) {
          for (int64_t o = row; o < least(row + kRowsAtOnce, n_out); ++o)
            sample_row(dy + o * depth, x, depth, columns, call.at.offsets[o], call.at.offsets[o + 1], t0 == 0,
                       call.products);
        });
      team.barrier();
      if (team.id == 0) pieces_taken = rows_taken = 0;
      team.barrier();
    }
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool linear_delta(const LinearCall& call, float* sums) {
  return by_dtype(call.dtype, [&](auto x) { return delta_of_few<decltype(x)>(call, sums); });
}

bool linear_sampled(const SampledCall& call) {
  return by_dtype(call.dtype, [&](auto x) { return sampled<decltype(x)>(call); });
}

}  // namespace TW_ISA
}  // namespace tw
