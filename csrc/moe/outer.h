// Gradients of the weights: sums over an expert's rows of outer products.
#pragma once

#include "moe/experts.h"

namespace tw {
namespace {

constexpr int kOuter = 256;    // rows that one product sums up
constexpr int kGathered = 32;  // of them that are copied at once

// Rows as a side of an outer product: packed ones, or a tensor's rows gathered and scaled.
template <class T, class C>
struct Source {
  const MoeCall& call;
  const LeftRows<C>* packed;  // or nullptr:
  Rows tokens;
  bool scales;

  void copy(C* to, int64_t row, int64_t column, int n) const {
    if (packed)
      memcpy(static_cast<void*>(to), packed->at(row) + column, sizeof(C) * static_cast<size_t>(n));
    else
      gather_row<T>(to, tokens, token_of(call, row), column, n, n, scales ? gate_of(call, row) : 1.0f);
  }
};

template <class C>
struct OuterScratch {
  C *copied, *left_lanes, *left, *right;
  float* sums;

  static constexpr int64_t kLeftRowOuter = kOuter + 32;

  int64_t lay_out(char* base) {
    Arena arena{base};
    copied = arena.take<C>(kGathered * int64_t{kPanelLanes});
    left_lanes = arena.take<C>(kPanelLanes * int64_t{kOuter});
    left = arena.take<C>(kPanelLanes * kLeftRowOuter);
    right = arena.take<C>(kPanelLanes * int64_t{kOuter});
    sums = arena.take<float>(kPanelLanes * kSumsRow);
    return arena.at - base;
  }
};

// Columns [n0, n0 + lanes) of `rows` rows as lanes of a product: strips of kOuter depth.
template <class T, class C>
inline void pack_columns(C* to, const Source<T, C>& from, int64_t row, int rows, int64_t n0, int lanes,
                         C* copied) {
  for (int r = 0; r < rows; r += kGathered) {
    const int some = static_cast<int>(least(kGathered, rows - r));
    for (int i = 0; i < some; ++i) from.copy(copied + i * int64_t{kPanelLanes}, row + r + i, n0, lanes);
    LanesAreColumns<C, C>{{copied, kPanelLanes}, lanes, some}.build(
        {to + r * kStrip<C>, kStrip<C> * int64_t{kOuter}, nullptr}, 0, strips_of<C>(lanes), 0, some);
  }
}

// to[m][n] = sum over rows [begin, end) of left[row][m0 + m] right[row][n0 + n], rows of `to` ld apart.
template <class T, class C>
inline void outer_product(T* to, int64_t ld, const Source<T, C>& left, const Source<T, C>& right,
                          int64_t begin, int64_t end, int64_t m0, int m, int64_t n0, int n,
                          const OuterScratch<C>& s) {
  constexpr int kDepth = Unit<C>::kDepth;
  constexpr int64_t kLeft = OuterScratch<C>::kLeftRowOuter;
  const int strips = strips_of<C>(n), m_padded = static_cast<int>(round_up(m, Unit<C>::kRowStep));
  for (int64_t r = begin; r < end; r += kOuter) {
    const int rows = static_cast<int>(least(kOuter, end - r)), units = depth_of<C>(rows);
    pack_columns(s.right, right, r, rows, n0, n, s.copied);
    pack_columns(s.left_lanes, left, r, rows, m0, m, s.copied);
    for (int i = 0; i < m; i += kStrip<C>)
      transpose_words(reinterpret_cast<float*>(s.left + i * kLeft), kLeft / kDepth,
                      reinterpret_cast<const float*>(s.left_lanes + i * int64_t{kOuter}), kStrip<C>,
                      static_cast<int>(round_up(units, W)), kStrip<C>);
    for (int strip = 0; strip < strips; ++strip) {
      const C* b = s.right + strip * kStrip<C> * int64_t{kOuter};
      float* c = s.sums + strip * kStrip<C>;
      if (r == begin)
        gemm<C, Start::zero>(m_padded, kStrip<C>, units, s.left, kLeft, b, kStrip<C>, c, kSumsRow);
      else
        gemm<C, Start::add_to>(m_padded, kStrip<C>, units, s.left, kLeft, b, kStrip<C>, c, kSumsRow);
    }
  }
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; j += W) {
      const int some = static_cast<int>(least(W, n - j));
      store_n(to + i * ld + j, begin < end ? load(s.sums + i * kSumsRow + j) : zero(), some);
    }
}

// to[e][j] = sum over the rows of expert e of from[row][j]
template <class T, class C>
inline void column_sums(float* to, const Source<T, C>& from, int64_t width, int64_t* taken, C* copied) {
  const MoeCall& call = from.call;
  const int64_t pieces = (width + kPanelLanes - 1) / kPanelLanes;
  for (int64_t item; (item = take_next(taken)) < call.experts * pieces;) {
    const int64_t e = item / pieces, j0 = item % pieces * kPanelLanes;
    const int n = static_cast<int>(least(kPanelLanes, width - j0));
    float* sums = to + e * width + j0;
    for (int j = 0; j < n; ++j) sums[j] = 0.0f;
    for (int64_t r = call.starts[e]; r < call.starts[e + 1]; ++r) {
      from.copy(copied, r, j0, n);
      for (int j = 0; j < n; j += W) {
        const int some = static_cast<int>(least(W, n - j));
        store_n(sums + j, add(load_n(sums + j, some), load_n(copied + j, some)), some);
      }
    }
  }
}

}  // namespace
}  // namespace tw
