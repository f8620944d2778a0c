// Gradients of the weights: sums over an expert's rows of outer products.
#pragma once

#include "moe/experts.h"

namespace tw {
namespace {

constexpr int kOuter = 512;    // rows that one product sums up
constexpr int kGathered = 32;  // of them that are packed at once

// Rows as a side of an outer product: packed ones, or a tensor's rows gathered and scaled.
template <class T, class C>
struct Source {
  const MoeCall& call;
  const LeftRows<C>* packed;  // or nullptr:
  Rows tokens;
  bool scales;

  // Columns [n0, n0 + n) of `rows` rows from `row` on: where they lie, or copied.
  Rows piece(int64_t row, int rows, int64_t n0, int n, C* copied) const {
    if (packed) return {packed->at(row) + n0, packed->row};
    for (int i = 0; i < rows; ++i)
      gather_row<T>(copied + i * int64_t{kPanelLanes}, tokens, token_of(call, row + i), n0, n, n,
                    scales ? gate_of(call, row + i) : 1.0f);
    return {copied, kPanelLanes};
  }
};

template <class C>
struct OuterScratch {
  C *copied, *lanes, *left, *right;
  float* sums;

  static constexpr int64_t kLeft = kOuter + 32;  // elements: rows of `left` start in different cache sets

  int64_t lay_out(char* base) {
    Arena arena{base};
    copied = arena.take<C>(kGathered * int64_t{kPanelLanes});
    lanes = arena.take<C>(kGathered * int64_t{kPanelLanes});
    left = arena.take<C>(kPanelLanes * kLeft);
    right = arena.take<C>(kPanelLanes * int64_t{kOuter});
    sums = arena.take<float>(kPanelLanes * kSumsRow);
    return arena.at - base;
  }
};

// Columns [n0, n0 + n) of `rows` rows as lanes of a product: strips of kOuter depth.
template <class T, class C>
inline void pack_right(const OuterScratch<C>& s, const Source<T, C>& from, int64_t row, int rows, int64_t n0,
                       int n) {
  for (int r = 0; r < rows; r += kGathered) {
    const int some = static_cast<int>(least(kGathered, rows - r));
    LanesAreColumns<C, C>{from.piece(row + r, some, n0, n, s.copied), n, some}.build(
        {s.right + r * kStrip<C>, kStrip<C> * int64_t{kOuter}, nullptr}, 0, strips_of<C>(n), 0, some);
  }
}

// The same turned around, as rows of a product: left[column][row].
template <class T, class C>
inline void pack_left(const OuterScratch<C>& s, const Source<T, C>& from, int64_t row, int rows, int64_t m0,
                      int m) {
  constexpr int kWords = kGathered / Unit<C>::kDepth;
  for (int r = 0; r < rows; r += kGathered) {
    const int some = static_cast<int>(least(kGathered, rows - r));
    LanesAreColumns<C, C>{from.piece(row + r, some, m0, m, s.copied), m, some}.build(
        {s.lanes, kStrip<C> * int64_t{kGathered}, nullptr}, 0, strips_of<C>(m), 0, some);
    for (int i = 0; i < m; i += kStrip<C>)
      transpose_words(reinterpret_cast<float*>(s.left + i * OuterScratch<C>::kLeft + r),
                      OuterScratch<C>::kLeft / Unit<C>::kDepth,
                      reinterpret_cast<const float*>(s.lanes + i * int64_t{kGathered}), kStrip<C>, kWords,
                      kStrip<C>);
  }
}

// to[m][n] = sum over rows [begin, end) of left[row][m0 + m] right[row][n0 + n], rows of `to` ld apart.
template <class T, class C>
inline void outer_product(T* to, int64_t ld, const Source<T, C>& left, const Source<T, C>& right,
                          int64_t begin, int64_t end, int64_t m0, int m, int64_t n0, int n,
                          const OuterScratch<C>& s) {
  constexpr int64_t kLeft = OuterScratch<C>::kLeft;
  const int strips = strips_of<C>(n);
  for (int64_t r = begin; r < end; r += kOuter) {
    const int rows = static_cast<int>(least(kOuter, end - r)), units = depth_of<C>(rows);
    pack_right(s, right, r, rows, n0, n);
    pack_left(s, left, r, rows, m0, m);
    for (int i = 0; i < m; i += kBlock) {
      const int some = static_cast<int>(least(kBlock, m - i));
      const int padded = static_cast<int>(round_up(some, Unit<C>::kRowStep));
      // where there is nothing to add to, all blocks share the first one's place, in the nearest cache
      float* const sums = s.sums + (end - begin > kOuter ? i * kSumsRow : 0);
      for (int strip = 0; strip < strips; ++strip) {
        const C *a = s.left + i * kLeft, *b = s.right + strip * kStrip<C> * int64_t{kOuter};
        float* c = sums + strip * kStrip<C>;
        if (r == begin)
          gemm<C, Start::zero>(padded, kStrip<C>, units, a, kLeft, b, kStrip<C>, c, kSumsRow);
        else
          gemm<C, Start::add_to>(padded, kStrip<C>, units, a, kLeft, b, kStrip<C>, c, kSumsRow);
      }
      if (r + kOuter < end) continue;
      for (int k = 0; k < some; ++k)
        for (int j = 0; j < n; j += W) {
          T* at = to + (i + k) * ld + j;
          if (n - j >= W)
            store(at, load(sums + k * kSumsRow + j));
          else
            store_n(at, load(sums + k * kSumsRow + j), n - j);
        }
    }
  }
  for (int i = 0; begin == end && i < m; ++i) fill_zero(to + i * ld, n);
}

// One sum of outer products for each expert: (E, M, N), contiguous.
template <class T, class C>
struct OuterSums {
  T* to;
  Source<T, C> left, right;
  int64_t m, n;

  int64_t tiles() const {
    return (m + kPanelLanes - 1) / kPanelLanes * ((n + kPanelLanes - 1) / kPanelLanes);
  }
  void tile(int64_t e, int64_t index, const OuterScratch<C>& scratch) const {
    const int64_t across = (n + kPanelLanes - 1) / kPanelLanes;
    const int64_t m0 = index / across * kPanelLanes, n0 = index % across * kPanelLanes;
    outer_product(to + (e * m + m0) * n + n0, n, left, right, left.call.starts[e], left.call.starts[e + 1],
                  m0, static_cast<int>(least(kPanelLanes, m - m0)), n0,
                  static_cast<int>(least(kPanelLanes, n - n0)), scratch);
  }
};

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
      const C* row = static_cast<const C*>(from.piece(r, 1, j0, n, copied).data);
      for (int j = 0; j < n; j += W) {
        const int some = static_cast<int>(least(W, n - j));
        store_n(sums + j, add(load_n(sums + j, some), load_n(row + j, some)), some);
      }
    }
  }
}

}  // namespace
}  // namespace tw
