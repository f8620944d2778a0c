// The right sides of products of many tokens with a weight, packed panel by panel as gemm_tile.h reads them,
// in strips of kStrip lanes.
#pragma once

#include "common/gemm_tile.h"
#include "common/packed_lines.h"
#include "common/panel_extents.h"
#include "common/rows.h"

namespace tw {
namespace {

constexpr double kSerialFlops = 2e5;  // below, a second thread costs more than it does

// lanes of a strip: what the microkernel takes at once, and at least a row block of a packed weight
template <class C>
constexpr int kStrip = kHasMatrixUnit && sizeof(C) == 2 ? 2 * kUnitTile
                       : kMicroVectors * W >= kLineRows ? kMicroVectors * W
                                                        : kLineRows;

constexpr int64_t kLeftRow = kChunk + 32;  // elements: rows of a block start in different cache sets

template <class C>
inline int depth_of(int64_t k) {  // units, padded
  return static_cast<int>(round_up((k + Unit<C>::kDepth - 1) / Unit<C>::kDepth, Unit<C>::kDepthStep));
}

template <class T>
inline const T* row_at(const Rows& t, int64_t row, int64_t column) {
  return static_cast<const T*>(t.data) + row * t.row + column;
}
template <class T>
inline T* out_at(const Rows& t, int64_t row, int64_t column) {
  return static_cast<T*>(t.data) + row * t.row + column;
}

template <class C>
inline void fill_zero(C* to, int64_t n) {
  memset(static_cast<void*>(to), 0, sizeof(C) * static_cast<size_t>(n));
}

// Strips are [depth][lane] in units, with zeros past n and k.

// Strip s of a panel begins at s * kStripElements.
template <class C>
constexpr int64_t kStripElements = kStrip<C> * int64_t{kChunk};

// What a builder may write to: strips of a panel, and kLineRows rows of kLeftRow to stage in.
template <class C>
struct PanelRoom {
  C* panel;
  int64_t strip_elements;  // from one strip to the next
  C* staged;

  C* strip(int s) const { return panel + s * strip_elements; }
};

constexpr int kRowsAhead = 8;  // of prefetching along rows that are read by the piece

template <class T>
inline void prefetch_row(const T* at, int n) {
  const char* bytes = reinterpret_cast<const char*>(at);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// lane n, depth k: rows[n][k]. Rows run along the depth, as a weight (O, I) in the forward.
template <class T, class C>
struct LanesAreRows {
  Rows rows;
  int64_t n_rows;

  void build(const PanelRoom<C>& room, int64_t n0, int strips, int64_t k0, int k) const {
    for (int s = 0; s < strips; ++s)
      for (int n = 0; n < kStrip<C>; n += kLineRows)
        sixteen(room.strip(s) + n * Unit<C>::kDepth, room.staged, n0 + s * kStrip<C> + n, k0, k);
  }

  void sixteen(C* strip, C* staged, int64_t n, int64_t k0, int k) const {
    const int depth = depth_of<C>(k), words = static_cast<int>(round_up(depth, W));
    for (int r = 0; r < kLineRows; ++r) {
      C* row = staged + r * kLeftRow;
      if (n + r < n_rows)
        copy_row(row, row_at<T>(rows, n + r, k0), 1, k, words * Unit<C>::kDepth);
      else
        fill_zero(row, words * Unit<C>::kDepth);
      if (n + kLineRows + r < n_rows) prefetch_row(row_at<T>(rows, n + kLineRows + r, k0), k);
    }
    float* to = reinterpret_cast<float*>(strip);
    const float* from = reinterpret_cast<const float*>(staged);
    constexpr int64_t kFromRow = kLeftRow / Unit<C>::kDepth;
    for (int c = 0; c < words; c += W)
      for (int r = 0; r < kLineRows; r += W) {
        vf square[W];
        for (int i = 0; i < W; ++i) square[i] = load(from + (r + i) * kFromRow + c);
        transpose(square);
        for (int i = 0; i < W && c + i < depth; ++i) store(to + (c + i) * kStrip<C> + r, square[i]);
      }
  }
};

// lane n, depth k: rows[k][n]. Rows run along the lanes, as a weight (O, I) in the backward.
template <class T, class C>
struct LanesAreColumns {
  Rows rows;
  int64_t n_columns, n_rows;

  void build(const PanelRoom<C>& room, int64_t n0, int strips, int64_t k0, int k) const {
    constexpr int kDepth = Unit<C>::kDepth;
    const int width = depth_of<C>(k) * kDepth;
    const int columns = static_cast<int>(most(0, least(strips * kStrip<C>, n_columns - n0)));
    for (int d = 0; d < width; d += kDepth) {
      for (int i = 0; i < kDepth; ++i)
        if (k0 + d + i + kRowsAhead < n_rows)
          prefetch_row(row_at<T>(rows, k0 + d + i + kRowsAhead, n0), columns);
      for (int s = 0; s < strips; ++s) {
        C* to = room.strip(s) + static_cast<int64_t>(d) * kStrip<C>;
        for (int n = 0; n < kStrip<C>; n += W) {
          const int lanes = static_cast<int>(most(0, least(W, columns - s * kStrip<C> - n)));
          const int64_t column = n0 + s * kStrip<C> + n;
          if constexpr (kDepth == 1)
            store(to + n, part(k0 + d, d < k ? lanes : 0, column));
          else if (sizeof(T) == sizeof(C) && lanes == W && d + 1 < k)
            interleave(to + 2 * n, reinterpret_cast<const C*>(row_at<T>(rows, k0 + d, column)),
                       reinterpret_cast<const C*>(row_at<T>(rows, k0 + d + 1, column)));
          else
            store_pairs(to + 2 * n, part(k0 + d, d < k ? lanes : 0, column),
                        part(k0 + d + 1, d + 1 < k ? lanes : 0, column));
        }
      }
    }
  }

  vf part(int64_t row, int lanes, int64_t column) const {
    if (lanes == 0) return zero();
    const T* at = row_at<T>(rows, row, column);
    return lanes == W ? load(at) : load_n(at, lanes);
  }
};

// lane n, depth k: W[n][k] of a packed weight.
template <Codes KIND, class C>
struct PackedLanesAreRows {
  const PackedWeight& w;
  int64_t n_rows;

  void build(const PanelRoom<C>& room, int64_t n0, int strips, int64_t k0, int k) const {
    for (int s = 0; s < strips; ++s)
      for (int n = 0; n < kStrip<C>; n += kLineRows)
        sixteen(room.strip(s) + n * Unit<C>::kDepth, n0 + s * kStrip<C> + n, k0, k);
  }

  void sixteen(C* strip, int64_t n, int64_t k0, int k) const {
    const int width = depth_of<C>(k) * Unit<C>::kDepth;
    const Table table(w.table);
    // the same inputs of the next row block are what will be wanted next
    const int64_t ahead = n + kLineRows < n_rows ? w.lines * kLineBytes : 0;
    const auto put = [&](int i, const uint8_t* line, const RowValues& scale, const RowValues& offset) {
      __builtin_prefetch(line + ahead, 0, 2);
      if (w.offsets)
        put_line<true>(strip, table, line, i, scale, offset);
      else
        put_line<false>(strip, table, line, i, scale, offset);
    };
    int done = 0;
    if (n < n_rows) {
      each_line<KIND>(w, n / kLineRows, k0, k, put);
      done = static_cast<int>(round_up(k, line_inputs(KIND)));
    }
    for (int d = done / Unit<C>::kDepth; d < width / Unit<C>::kDepth; ++d)
      fill_zero(strip + static_cast<int64_t>(d) * kStrip<C> * Unit<C>::kDepth, kLineRows * Unit<C>::kDepth);
  }

  template <bool HAS_OFFSET>
  [[gnu::always_inline]] static void put_line(C* strip, const Table& table, const uint8_t* line, int k,
                                              const RowValues& scale, const RowValues& offset) {
    for (int v = 0; v < kRowVectors; ++v) {
      const vi words = load_words(line + v * W * 4);
      const auto value = [&](auto at) {
        const vf code = line_value<KIND, decltype(at)::value>(table, words);
        return HAS_OFFSET ? fma(code, scale.v[v], offset.v[v]) : mul(code, scale.v[v]);
      };
      C* to = strip + static_cast<int64_t>(k) * kStrip<C> + v * W * Unit<C>::kDepth;
      each_input<KIND>([&](auto at) {
        constexpr int K = decltype(at)::value;
        if constexpr (Unit<C>::kDepth == 1)
          store(to + K * kStrip<C>, value(at));
        else if constexpr (K % 2 == 0)
          store_pairs(to + K * kStrip<C>, value(Index<K>{}), value(Index<K + 1>{}));
      });
    }
  }
};

// lane n, depth k: W[k][n] of a packed weight.
template <Codes KIND, class C>
struct PackedLanesAreColumns {
  const PackedWeight& w;
  int64_t n_columns, n_rows;

  void build(const PanelRoom<C>& room, int64_t n0, int strips, int64_t k0, int k) const {
    const int width = depth_of<C>(k) * Unit<C>::kDepth;
    for (int d = 0; d < width; d += kLineRows)
      for (int s = 0; s < strips; ++s)
        sixteen(room.strip(s) + static_cast<int64_t>(d) * kStrip<C>, n0 + s * kStrip<C>, k0 + d,
                most(0, k - d), width - d);
  }

  // Rows [row, row + 16) of W as depth; `rows` of them exist, `width` are wanted.
  void sixteen(C* strip, int64_t n, int64_t row, int64_t rows, int width) const {
    alignas(64) float values[kStrip<C> * kLineRows];  // [column][row]
    const int columns = static_cast<int>(most(0, least(kStrip<C>, n_columns - n)));
    if (rows > 0 && columns > 0) {
      decode_lines<KIND>(values, kLineRows, w, row / kLineRows, n, columns);
      fill_zero(values + columns * kLineRows, (kStrip<C> - columns) * kLineRows);
      // nested scales say something of rows past the last, and NaN times the left side's zeros is NaN
      for (int c = 0; rows < kLineRows && c < columns; ++c)
        fill_zero(values + c * kLineRows + rows, kLineRows - rows);
    } else {
      fill_zero(values, kStrip<C> * kLineRows);
    }
    for (int c = 0; c < kStrip<C>; c += W)
      for (int v = 0; v < kLineRows && v < width; v += W) {
        vf square[W];
        for (int i = 0; i < W; ++i) square[i] = load(values + (c + i) * kLineRows + v);
        transpose(square);
        C* to = strip + static_cast<int64_t>(v) * kStrip<C> + c * Unit<C>::kDepth;
        for (int i = 0; i < W && v + i < width; i += Unit<C>::kDepth) {
          if constexpr (Unit<C>::kDepth == 1)
            store(to + i * kStrip<C>, square[i]);
          else
            store_pairs(to + i * kStrip<C>, square[i], square[i + 1]);
        }
      }
  }
};

}  // namespace
}  // namespace tw
