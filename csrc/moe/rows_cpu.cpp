// Forward where each expert has a few rows: an expert's weights are read once and meet all its rows in
// registers; experts without rows are not touched. Lines of codes are decoded in registers.
#include "common/line_product.h"
#include "moe/experts.h"

namespace tw {
namespace {

constexpr int kFewRows = 4;       // of an expert at most
constexpr int64_t kRowUnit = 64;  // elements that rows are padded to: whole lines, whole vectors
constexpr int kDots = 4;          // rows of a weight that are read side by side
constexpr int kStep = 64;         // outputs that a thread takes at once: whole blocks of lines
constexpr int kVectorsOfStep = kStep / W;
constexpr int kFarAhead = 16;          // rows of prefetching where a step reads pieces of them
constexpr int64_t kBytesAhead = 2048;  // of prefetching along a row block of lines

// Rows of one expert: values `ld` apart, zeros past the depth; results `to_ld` apart. group_sums: of each
// row's values group by group of a packed weight, where that has offsets.
template <class C>
struct FewRows {
  const C* x;
  int64_t ld, depth;
  const float* group_sums;
  float* to;
  int64_t to_ld;
};

// W units of a dense row, as the products of type C take them
template <class C, class T>
[[gnu::always_inline]] inline auto dense_lanes(const T* row) {
  if constexpr (sizeof(C) == sizeof(T))
    return Unit<C>::lanes(reinterpret_cast<const C*>(row));
  else
    return load(row);
}

// to[r][n] for n in [n0, n1), where outputs are rows of the weight
template <class T, class C, int ROWS>
inline void by_rows(const FewRows<C>& few, const Rows& weight, int64_t n0, int64_t n1) {
  constexpr int kUnits = W * Unit<C>::kDepth;
  const int64_t whole = few.depth / kUnits * kUnits;
  for (int64_t n = n0; n < n1; n += kDots) {
    const T* rows[kDots];
    for (int d = 0; d < kDots; ++d) rows[d] = row_at<T>(weight, least(n + d, n1 - 1), 0);
    vf sums[kDots][ROWS];
    for (auto& of_row : sums)
      for (vf& sum : of_row) sum = zero();
    // rows are too short for the processor's own prefetching to be of use: the next ones, into the second
    // cache
    const int64_t ahead = kDots * weight.row;
    for (int64_t i = 0; i < whole; i += kUnits)
#pragma GCC unroll 4
      for (int d = 0; d < kDots; ++d) {
        __builtin_prefetch(rows[d] + i + ahead, 0, 2);
        const auto lanes = dense_lanes<C>(rows[d] + i);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
          sums[d][r] = Unit<C>::mac(sums[d][r], Unit<C>::lanes(few.x + r * few.ld + i), lanes);
      }
    for (int d = 0; d < kDots && n + d < n1; ++d)
      for (int r = 0; r < ROWS; ++r) {
        vf tail = zero();
        for (int64_t i = whole; i < few.depth; i += W) {
          const int some = static_cast<int>(least(W, few.depth - i));
          tail = fma(load_n(few.x + r * few.ld + i, some), load_n(rows[d] + i, some), tail);
        }
        few.to[r * few.to_ld + n + d] = sum(add(sums[d][r], tail));
      }
  }
}

// The same where outputs are columns of the weight.
template <class T, class C, int ROWS>
inline void by_columns(const FewRows<C>& few, const Rows& weight, int64_t n0, int64_t n1) {
  const int lanes = static_cast<int>(n1 - n0), vectors = (lanes + W - 1) / W;
  for (int v = 0; v < vectors; v += 4) {
    vf sums[ROWS][4];
    for (auto& of_row : sums)
      for (vf& sum : of_row) sum = zero();
    for (int64_t k = 0; k < few.depth; ++k) {
      const T* row = row_at<T>(weight, k, n0 + v * W);
      if (k + kFarAhead < few.depth) __builtin_prefetch(row + kFarAhead * weight.row, 0, 2);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int some = static_cast<int>(most(0, least(W, lanes - (v + i) * W)));
        const vf w = some == W ? load(row + i * W) : load_n(row + i * W, some);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) sums[r][i] = fma(set1(to_float(few.x[r * few.ld + k])), w, sums[r][i]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < 4; ++i) {
        const int some = static_cast<int>(most(0, least(W, lanes - (v + i) * W)));
        if (some > 0) store_n(few.to + r * few.to_ld + n0 + (v + i) * W, sums[r][i], some);
      }
  }
}

// The same of a packed weight: the outputs of BLOCKS row blocks from `block` on, written from column n0 on.
template <Codes KIND, class X, int ROWS, int BLOCKS>
inline void by_lines(const FewRows<X>& few, const PackedWeight& w, int64_t block, int64_t n0) {
  constexpr int kInputs = line_inputs(KIND);
  const LineProduct<X, KIND> product(w.table);
  vf sums[BLOCKS][kRowVectors][ROWS];
  for (auto& of_block : sums)
    for (auto& of_vector : of_block)
      for (vf& sum : of_vector) sum = zero();
  const uint8_t* line = w.codes + block * w.lines * kLineBytes;
  int64_t input = 0;
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t end = w.groups == 1 ? few.depth : least(input + w.group_size, few.depth);
    vf part[BLOCKS][kRowVectors][ROWS];
    for (auto& of_block : part)
      for (auto& of_vector : of_block)
        for (vf& sum : of_vector) sum = zero();
    for (; input < end; input += kInputs, line += kLineBytes)
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; ++b)
#pragma GCC unroll 4
        for (int v = 0; v < kRowVectors; ++v) {
          const uint8_t* at = line + b * w.lines * kLineBytes + v * W * 4;
          if (v == 0) __builtin_prefetch(at + kBytesAhead, 0, 2);
          product.add(part[b][v], load_words(at), few.x + input, few.ld);
        }
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) {
      const RowValues scale = scales_of(w, block + b, group);
#pragma GCC unroll 4
      for (int v = 0; v < kRowVectors; ++v)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) sums[b][v][r] = fma(part[b][v][r], scale.v[v], sums[b][v][r]);
      if (!w.offsets) continue;
      const RowValues offset = offsets_of(w, block + b, group);
      for (int v = 0; v < kRowVectors; ++v)
        for (int r = 0; r < ROWS; ++r)
          sums[b][v][r] = fma(offset.v[v], set1(few.group_sums[r * w.groups + group]), sums[b][v][r]);
    }
  }
  for (int b = 0; b < BLOCKS; ++b)
    for (int v = 0; v < kRowVectors; ++v)
      for (int r = 0; r < ROWS; ++r)
        store(few.to + r * few.to_ld + n0 + b * kLineRows + v * W, sums[b][v][r]);
}

template <Codes KIND, class X, int ROWS>
inline void lines_step(const FewRows<X>& few, const PackedWeight& w, int64_t first_row, int64_t n0,
                       int64_t n1) {
  // pairs are of 4-bit codes alone, see moe_rows
  if constexpr (sizeof(X) == 4 || KIND == Codes::table) {
    constexpr int kBlocks = ROWS > 2 ? 2 : 4, kRows = kBlocks * kLineRows;
    int64_t n = n0;
    for (; n + kRows <= n1; n += kRows)
      by_lines<KIND, X, ROWS, kBlocks>(few, w, (first_row + n) / kLineRows, n);
    for (; n < n1; n += kLineRows) by_lines<KIND, X, ROWS, 1>(few, w, (first_row + n) / kLineRows, n);
  }
}

template <class T, class X, int ROWS>
inline void product_step(const FewRows<X>& few, const Weight<T, X>& weight, int64_t e, int64_t n0) {
  const int64_t n1 = least(n0 + kStep, weight.n_out);
  if (!weight.w.rows.data)
    by_kind(weight.w.packed.kind, [&](auto kind) {
      lines_step<decltype(kind)::value, X, ROWS>(few, weight.w.packed, e * weight.n_out, n0, n1);
    });
  else if (weight.transposed)
    by_columns<T, X, ROWS>(few, weight.of(e), n0, n1);
  else
    by_rows<T, X, ROWS>(few, weight.of(e), n0, n1);
}

// Rows between the two products, all of them; each expert's are followed by kFewRows more that may be read.
template <class C>
struct Between {
  const PackedWeight& weight;  // that they meet, if it is packed
  C* data;
  float* sums;  // (rows, groups), see FewRows
  int64_t depth, ld;

  Between(const ExpertWeight& w, int64_t d)
      : weight(w.packed), data(nullptr), sums(nullptr), depth(d), ld(round_up(d, kRowUnit)) {}
  int64_t elements(int64_t rows) const { return (rows + kFewRows) * ld; }
  int64_t groups() const { return weight.offsets ? weight.groups : 0; }
  C* at(int64_t row) const { return data + row * ld; }

  void add_up(int64_t row) const {
    for (int64_t group = 0; group < groups(); ++group) {
      const int64_t begin = group * weight.group_size;
      const int64_t end = weight.groups == 1 ? depth : least(begin + weight.group_size, depth);
      vf total = zero();
      for (int64_t i = begin; i < end; i += W)
        total = add(total, load_n(at(row) + i, static_cast<int>(least(W, end - i))));
      sums[row * groups() + group] = sum(total);
    }
  }
};

// to (rows, n_out) = rows of x times the weights of their experts; neighbouring outputs to one thread.
template <class T, class C>
inline void few_products(const MoeCall& call, const Between<C>& x, const Weight<T, C>& weight, float* to,
                         const int64_t* active, int64_t n_active, const Team& team) {
  const int64_t steps = (weight.n_out + kStep - 1) / kStep, all = n_active * steps;
  for (int64_t i = all * team.id / team.size; i < all * (team.id + 1) / team.size; ++i) {
    const int64_t e = active[i / steps], row = call.starts[e], rows = call.starts[e + 1] - row;
    const FewRows<C> few{x.at(row),   x.ld, x.depth, x.sums + row * x.groups(), to + row * weight.n_out,
                         weight.n_out};
    if (rows == 1)
      product_step<T, C, 1>(few, weight, e, i % steps * kStep);
    else if (rows == 2)
      product_step<T, C, 2>(few, weight, e, i % steps * kStep);
    else if (rows == 3)
      product_step<T, C, 3>(few, weight, e, i % steps * kStep);
    else
      product_step<T, C, 4>(few, weight, e, i % steps * kStep);
  }
}

template <class T, class C, Gate GATE>
inline void gate_row(const MoeCall& call, const float* sums, int64_t e, int64_t row, const Between<C>& a) {
  const float* bias = call.up_bias ? call.up_bias + e * lines_of(call) : nullptr;
  T* z = call.z ? static_cast<T*>(call.z) + row * lines_of(call) : nullptr;
  const T* update = update_of<T>(call, row);
  for (int64_t i = 0; i < call.width; i += W) {
    const int some = static_cast<int>(least(W, call.width - i));
    GateAndUp pair = load_pair(sums, i, call.width, some, call.layout);
    if (bias) pair = plus_pair(pair, bias, i, call.width, some, call.layout);
    if (update) pair = plus_pair(pair, update, i, call.width, some, call.layout);
    if (z) store_pair(z, i, call.width, some, call.layout, pair.gate, pair.up);
    store_n(a.at(row) + i, gated<GATE>(pair.gate, pair.up, call.alpha, call.limit).a, some);
  }
  fill_zero(a.at(row) + a.depth, a.ld - a.depth);
  a.add_up(row);
}

// C: what rows are kept as
template <class T, class C>
bool few_rows(const MoeCall& call) {
  const int64_t rows = call.starts[call.experts];
  const Weight<T, C> up{call.up, call.experts, lines_of(call), call.features, call.transposed};
  const Weight<T, C> down{call.down, call.experts, call.features, call.width, call.transposed};
  const double weights = 3.0 * static_cast<double>(least(rows, call.experts)) *
                         static_cast<double>(call.features) * static_cast<double>(call.width);
  const int threads = weights < kSerialWeights ? 1 : call.threads;
  Between<C> x(call.up, call.features), a(call.down, call.width);
  float *sums = nullptr, *out = nullptr;
  int64_t* active = nullptr;
  int32_t* row_of = nullptr;
  const auto lay_out = [&](char* base) {
    Arena arena{base};
    active = arena.take<int64_t>(call.experts);
    row_of = arena.take<int32_t>(call.tokens * call.slots);
    x.data = arena.take<C>(x.elements(rows));
    a.data = arena.take<C>(a.elements(rows));
    x.sums = arena.take<float>(rows * x.groups());
    a.sums = arena.take<float>(rows * a.groups());
    sums = arena.take<float>(rows * lines_of(call));
    out = arena.take<float>(rows * call.features);
    return arena.at - base;
  };
  char* workspace = take_workspace(lay_out(nullptr));
  if (!workspace) return false;
  lay_out(workspace);
  invert(call, row_of);
  int64_t n_active = 0;
  for (int64_t e = 0; e < call.experts; ++e) {
    if (call.starts[e + 1] > call.starts[e]) active[n_active++] = e;
    for (int64_t r = call.starts[e]; r < call.starts[e + 1]; ++r) {
      gather_row<T>(x.at(r), call.x, token_of(call, r), 0, static_cast<int>(call.features),
                    static_cast<int>(x.ld), call.scale_input ? gate_of(call, r) : 1.0f);
      x.add_up(r);
    }
  }
  run_team(threads, [&](const Team& team) {
    few_products(call, x, up, sums, active, n_active, team);
    team.barrier();
    for (int64_t i = team.id; i < n_active; i += team.size)
      for (int64_t r = call.starts[active[i]]; r < call.starts[active[i] + 1]; ++r)
        by_gate(call.gate, [&](auto gate) {
          gate_row<T, C, decltype(gate)::value>(call, sums + r * lines_of(call), active[i], r, a);
        });
    team.barrier();
    few_products(call, a, down, out, active, n_active, team);
    team.barrier();
    for (int64_t i = team.id; i < n_active; i += team.size)
      for (int64_t r = call.starts[active[i]]; r < call.starts[active[i] + 1]; ++r) {
        const vf by = set1(call.scale_input ? 1.0f : gate_of(call, r));
        const float* bias = call.down_bias ? call.down_bias + active[i] * call.features : nullptr;
        for (int64_t h = 0; h < call.features; h += W) {
          const int some = static_cast<int>(least(W, call.features - h));
          float* at = out + r * call.features + h;
          const vf y = bias ? add(load_n(at, some), load_n(bias + h, some)) : load_n(at, some);
          store_n(at, mul(y, by), some);
        }
      }
    team.barrier();
    add_slots<T>(call, call.y, out, row_of, team);
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool moe_rows(const MoeCall& call) {
  return by_dtype(call.dtype, [&](auto x) {
    using T = decltype(x);
    using C = typename ComputeType<T>::type;
    // bytes meet floats
    const auto has_bytes = [](const ExpertWeight& w) {
      return !w.rows.data && w.packed.kind != Codes::table;
    };
    if (has_bytes(call.up) || has_bytes(call.down)) return few_rows<T, float>(call);
    return few_rows<T, C>(call);
  });
}

}  // namespace TW_ISA
}  // namespace tw
