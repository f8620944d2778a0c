// What forward and backward share: groups of rows, gathered rows, the experts' weights as panels, and the
// sums over a token's slots.
#pragma once

#include "common/arena.h"
#include "common/by_dtype.h"
#include "common/panels.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "moe/gated.h"
#include "moe/moe.h"

namespace tw {
namespace {

// At most so many rows of one expert that an item multiplies by a panel, and rows whose left side is packed
// at once, for each thread.
constexpr int64_t kRowsOfGroup = kTokensOfItem, kRowsAtOnce = 1024;
constexpr int kHalf = kPanelLanes / 2;  // lanes of a panel for gates, as many for ups if there are any

struct Group {
  int64_t expert, begin, end;  // rows
};

inline int64_t count_groups(const MoeCall& call) {
  int64_t n = 0;
  for (int64_t e = 0; e < call.experts; ++e)
    n += (call.starts[e + 1] - call.starts[e] + kRowsOfGroup - 1) / kRowsOfGroup;
  return n;
}

inline void list_groups(const MoeCall& call, Group* to) {
  for (int64_t e = 0; e < call.experts; ++e)
    for (int64_t r = call.starts[e]; r < call.starts[e + 1]; r += kRowsOfGroup)
      *to++ = {e, r, least(r + kRowsOfGroup, call.starts[e + 1])};
}

// The first group that does not fit into a pass that begins with group `from`.
inline int64_t end_of_pass(const Group* groups, int64_t n, int64_t from, int64_t most_rows) {
  int64_t to = from + 1;
  while (to < n && groups[to].end - groups[from].begin <= most_rows) ++to;
  return to;
}

inline int64_t token_of(const MoeCall& call, int64_t row) {
  return call.order ? call.order[row] / call.slots : row;
}
inline float gate_of(const MoeCall& call, int64_t row) { return call.gates[call.order[row]]; }
template <class T>
inline const T* update_of(const MoeCall& call, int64_t row) {
  return call.z_update ? static_cast<const T*>(call.z_update) + row * lines_of(call) : nullptr;
}

// The rows of experts as a call that has nothing else: enough for groups of rows and for gathering.
inline MoeCall rows_alone(int64_t experts, const int64_t* starts, const IndexedRows& from) {
  MoeCall call = {};
  call.experts = experts;
  call.slots = 1;
  call.starts = starts;
  call.order = from.index;
  call.x = from.rows;
  return call;
}

// --- left sides: rows that are `row` elements apart, zeros from their depth up to what products read ---

constexpr int kLeftUnit = 32;  // elements that a matrix unit takes at once

inline int64_t padded_depth(int64_t depth) { return round_up(depth, kLeftUnit); }

template <class C>
struct LeftRows {
  C* data;
  int64_t depth, row;

  explicit LeftRows(int64_t d) : data(nullptr), depth(d), row(round_up(d, 64) + 32) {}
  // products read whole blocks of rows
  int64_t elements(int64_t rows) const { return (rows + Unit<C>::kRowStep) * row; }
  C* at(int64_t r) const { return data + r * row; }
  void pad(int64_t r) const { fill_zero(at(r) + depth, padded_depth(depth) - depth); }
};

// A token's row of `from` times a factor.
template <class T, class C>
inline void gather_row(C* to, const Rows& from, int64_t token, int64_t column, int n, int padded, float by) {
  copy_row(to, row_at<T>(from, token, column), 1, n, padded);
  if (by == 1.0f) return;
  for (int i = 0; i < n; i += W) {
    const int some = static_cast<int>(least(W, n - i));
    store_n(to + i, mul(load_n(to + i, some), set1(by)), some);
  }
}

// Rows [begin, end), block by block, as long as `taken` has blocks to give.
template <class T, class C>
inline void gather_rows(const LeftRows<C>& to, const MoeCall& call, const Rows& from, bool scales,
                        int64_t begin, int64_t end, int64_t* taken) {
  for (int64_t block; (block = take_next(taken)) * kBlock < end - begin;)
    for (int64_t r = begin + block * kBlock; r < least(begin + (block + 1) * kBlock, end); ++r)
      gather_row<T>(to.at(r - begin), from, token_of(call, r), 0, static_cast<int>(to.depth),
                    static_cast<int>(padded_depth(to.depth)), scales ? gate_of(call, r) : 1.0f);
}

// --- right sides: the weight of an expert ---

template <class T, class C>
struct Weight {
  const ExpertWeight& w;
  int64_t experts, n_out, n_in;
  bool transposed;

  Rows of(int64_t e) const { return {static_cast<T*>(w.rows.data) + e * w.expert, w.rows.row}; }

  // lanes are outputs, depth is inputs
  void outputs(const PanelRoom<C>& room, int64_t e, int64_t n0, int strips, int64_t k0, int k) const {
    if (!w.rows.data)
      by_kind(w.packed.kind, [&](auto kind) {
        PackedLanesAreRows<decltype(kind)::value, C>{w.packed, experts * n_out}.build(room, e * n_out + n0,
                                                                                      strips, k0, k);
      });
    else if (transposed)
      LanesAreColumns<T, C>{of(e), n_out, n_in}.build(room, n0, strips, k0, k);
    else
      LanesAreRows<T, C>{of(e), n_out}.build(room, n0, strips, k0, k);
  }

  // lanes are inputs, depth is outputs
  void inputs(const PanelRoom<C>& room, int64_t e, int64_t n0, int strips, int64_t k0, int k) const {
    if (!w.rows.data)
      by_kind(w.packed.kind, [&](auto kind) {
        PackedLanesAreColumns<decltype(kind)::value, C>{w.packed, n_in, experts * n_out}.build(
            room, n0, strips, e * n_out + k0, k);
      });
    else if (transposed)
      LanesAreRows<T, C>{of(e), n_in}.build(room, n0, strips, k0, k);
    else
      LanesAreColumns<T, C>{of(e), n_in, n_out}.build(room, n0, strips, k0, k);
  }
};

template <class C>
inline int strips_of(int64_t lanes) {
  return static_cast<int>((lanes + kStrip<C> - 1) / kStrip<C>);
}

// --- the product of a group and a panel ---

template <class C>
struct ProductScratch {
  C *staged, *panel;
  float* sums;  // of a group

  int64_t lay_out(char* base) {
    Arena arena{base};
    staged = arena.take<C>(kLineRows * kLeftRow);
    panel = arena.take<C>(kPanelLanes * int64_t{kChunk});
    sums = arena.take<float>((kRowsOfGroup + Unit<C>::kRowStep) * kSumsRow);
    return arena.at - base;
  }
};

// `rows` rows from `left` on times a panel of `strips`. build(room, k0, k) packs a chunk of it;
// finish(sums, first row, rows) once a block's sums are whole.
template <class C, class Build, class Finish>
inline void group_product(const LeftRows<C>& left, int64_t first, int64_t rows, int strips,
                          const ProductScratch<C>& scratch, const Build& build, const Finish& finish) {
  for (int64_t k0 = 0; k0 < most(left.depth, 1); k0 += kChunk) {
    const int k = static_cast<int>(least(kChunk, left.depth - k0)), units = depth_of<C>(k);
    build(PanelRoom<C>{scratch.panel, kStripElements<C>, scratch.staged}, k0, k);
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int some = static_cast<int>(least(kBlock, rows - r));
      const int padded = static_cast<int>(round_up(some, Unit<C>::kRowStep));
      const C* a = left.at(first + r) + k0;
      float* sums = scratch.sums + r * kSumsRow;
      for (int s = 0; s < strips; ++s) {
        const C* b = scratch.panel + s * kStripElements<C>;
        float* c = sums + s * kStrip<C>;
        if (k0 == 0)
          gemm<C, Start::zero>(padded, kStrip<C>, units, a, left.row, b, kStrip<C>, c, kSumsRow);
        else
          gemm<C, Start::add_to>(padded, kStrip<C>, units, a, left.row, b, kStrip<C>, c, kSumsRow);
      }
      if (k0 + kChunk >= left.depth) finish(sums, r, some);
    }
  }
}

// --- sums over slots ---

// row_of[slot]: its row, -1 where it goes nowhere
inline void invert(const MoeCall& call, int32_t* row_of) {
  const int64_t n = call.tokens * call.slots, rows = call.starts[call.experts];
  for (int64_t r = 0; r < n; ++r) row_of[call.order[r]] = r < rows ? static_cast<int32_t>(r) : -1;
}

// to[t] = the sum of the rows of its slots, in their order; rows are H apart
template <class T, class F>
inline void add_slots(const MoeCall& call, const Rows& to, const F* rows, const int32_t* row_of,
                      const Team& team) {
  for (int64_t t = call.tokens * team.id / team.size; t < call.tokens * (team.id + 1) / team.size; ++t)
    for (int64_t h = 0; h < call.features; h += W) {
      const int some = static_cast<int>(least(W, call.features - h));
      vf sum = zero();
      for (int64_t k = 0; k < call.slots; ++k) {
        const int64_t row = row_of[t * call.slots + k];
        if (row >= 0) sum = add(sum, load_n(rows + row * call.features + h, some));
      }
      store_n(out_at<T>(to, t, h), sum, some);
    }
}

}  // namespace
}  // namespace tw
