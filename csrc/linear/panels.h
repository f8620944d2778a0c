// A product of many tokens with a weight, panel by panel:
//
//   C[t][n] (float)  =  sum_k A[t][k] B[k][n]
//
// A panel is kPanelLanes lanes n of B over kChunk of depth, packed as gemm_tile.h reads it in strips of kStrip
// lanes; it stays in the second-level cache while blocks of tokens pass by. Depth is cut at the same places
// whatever the number of tokens and threads, so that a sum's order does not depend on them.
#pragma once

#include "common/gemm_tile.h"
#include "common/packed_lines.h"
#include "common/philox.h"
#include "linear/linear.h"

namespace tw {
namespace {

constexpr int kChunk = 512;       // depth of a panel, elements
constexpr int kPanelLanes = 256;  // of a panel
constexpr int kTokensOfItem = 512;

// lanes of a strip: what the microkernel takes at once, and at least a row block of a packed weight
template <class C>
constexpr int kStrip = kHasMatrixUnit && sizeof(C) == 2   ? 2 * kUnitTile
                       : kMicroVectors * W >= kLineRows ? kMicroVectors * W
                                                        : kLineRows;
// tokens of a block
constexpr int kBlock = kHasMatrixUnit ? 64 : 48;

constexpr int64_t kLeftRow = kChunk + 32;  // elements: rows of a block start in different cache sets

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

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

// --- the left side: tokens ---

// Multiplies inputs [k0, k0 + k) of token t, as kept in `row`, by their dropout factors.
template <class C>
inline void drop_row(C* row, const LinearCall& call, int64_t t, int64_t k0, int k) {
  const float keep = 1.0f / (1.0f - call.dropout_p);
  for (int i = 0; i < k; ++i) {
    const int64_t input = call.input_order ? call.input_order[k0 + i] : k0 + i;
    const Philox draw(call.dropout_seed, static_cast<uint32_t>(input / 4), static_cast<uint32_t>(t), 0);
    if (call.input_order) {
      const float factor = draw.uniform(static_cast<int>(input % 4)) >= call.dropout_p ? keep : 0.0f;
      row[i] = from_float<C>(to_float(row[i]) * factor);
    } else {  // k0 is a multiple of 4
      for (int w = 0; w < 4 && i + w < k; ++w)
        row[i + w] = from_float<C>(to_float(row[i + w]) * (draw.uniform(w) >= call.dropout_p ? keep : 0.0f));
      i += 3;
    }
  }
}

// Rows of tokens as the left side of a product: block[row][k], kLeftRow apart, zeros past rows and k.
template <class T, class C>
struct Tokens {
  Rows rows;
  const float* factors = nullptr;       // of each k, or nullptr
  const LinearCall* dropout = nullptr;  // whose dropout applies, or nullptr

  void fill(C* block, int64_t t0, int n_rows, int64_t k0, int k) const {
    const int width = depth_of<C>(k) * Unit<C>::kDepth;
    const int padded = static_cast<int>(round_up(n_rows, Unit<C>::kRowStep));
    for (int r = 0; r < padded; ++r) {
      C* row = block + r * kLeftRow;
      if (r >= n_rows) {
        fill_zero(row, width);
        continue;
      }
      copy_row(row, row_at<T>(rows, t0 + r, k0), 1, k, width);
      if (factors) scale_row(row, factors + k0, k);
      if (dropout && dropout->dropout_p > 0) drop_row(row, *dropout, t0 + r, k0, k);
    }
  }

  static void scale_row(C* row, const float* by, int k) {
    int i = 0;
    for (; i + W <= k; i += W) store(row + i, mul(load(row + i), load(by + i)));
    if (i < k) store_n(row + i, mul(load_n(row + i, k - i), load_n(by + i, k - i)), k - i);
  }
};

// --- the right side: strips of kStrip lanes, [depth][lane] in units, zeros past n and k ---

// lane n, depth k: rows[n][k]. Rows run along the depth, as a weight (O, I) in the forward.
template <class T, class C>
struct LanesAreRows {
  Rows rows;
  int64_t n_rows;

  // staged: kLineRows rows of kLeftRow elements
  void build(C* strip, C* staged, int64_t n0, int64_t k0, int k) const {
    const int depth = depth_of<C>(k);
    const int words = static_cast<int>(round_up(depth, W));
    for (int n = 0; n < kStrip<C>; n += kLineRows) {
      for (int r = 0; r < kLineRows; ++r) {
        C* row = staged + r * kLeftRow;
        if (n0 + n + r < n_rows)
          copy_row(row, row_at<T>(rows, n0 + n + r, k0), 1, k, words * Unit<C>::kDepth);
        else
          fill_zero(row, words * Unit<C>::kDepth);
      }
      float* to = reinterpret_cast<float*>(strip) + n;
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
  }
};

// lane n, depth k: rows[k][n]. Rows run along the lanes, as a weight (O, I) in the backward.
template <class T, class C>
struct LanesAreColumns {
  Rows rows;
  int64_t n_columns, n_rows;

  void build(C* strip, C*, int64_t n0, int64_t k0, int k) const {
    const int width = depth_of<C>(k) * Unit<C>::kDepth;
    for (int d = 0; d < width; d += Unit<C>::kDepth)
      for (int n = 0; n < kStrip<C>; n += W) {
        const int lanes = static_cast<int>(most(0, least(W, n_columns - n0 - n)));
        if constexpr (Unit<C>::kDepth == 1) {
          store(strip + static_cast<int64_t>(d) * kStrip<C> + n, part(k0, d, k, n0 + n, lanes));
        } else {
          store_pairs(strip + static_cast<int64_t>(d) * kStrip<C> + 2 * n, part(k0, d, k, n0 + n, lanes),
                      part(k0, d + 1, k, n0 + n, lanes));
        }
      }
  }

  vf part(int64_t k0, int d, int k, int64_t n, int lanes) const {
    if (d >= k || lanes == 0) return zero();
    const T* at = row_at<T>(rows, k0 + d, n);
    return lanes == W ? load(at) : load_n(at, lanes);
  }
};

// lane n, depth k: W[n][k] of a packed weight.
template <Codes KIND, class C>
struct PackedLanesAreRows {
  const PackedWeight& w;
  int64_t n_rows;

  void build(C* strip, C*, int64_t n0, int64_t k0, int k) const {
    constexpr int kInputs = KIND == Codes::table ? 8 : 4;
    const int width = depth_of<C>(k) * Unit<C>::kDepth;
    const Table table(w.table);
    for (int n = 0; n < kStrip<C>; n += kLineRows) {
      int done = 0;
      if (n0 + n < n_rows) {
        const int64_t block = (n0 + n) / kLineRows;
        const uint8_t* line = w.codes + (block * w.lines + k0 / kInputs) * kLineBytes;
        int64_t next_group = k0;  // the input from which another scale holds
        RowValues scale, offset;
        for (; done < k; done += kInputs, line += kLineBytes) {
          if (k0 + done >= next_group) {
            const int64_t group = group_of(w, k0 + done);
            next_group = w.groups == 1 ? INT64_MAX : (group + 1) * w.group_size;
            scale = scales_of(w, block, group);
            if (w.offsets) offset = offsets_of(w, block, group);
          }
          if (w.offsets)
            put_line<true>(strip, table, line, done, n, scale, offset);
          else
            put_line<false>(strip, table, line, done, n, scale, offset);
        }
      }
      for (int d = done / Unit<C>::kDepth; d < width / Unit<C>::kDepth; ++d)
        fill_zero(strip + (static_cast<int64_t>(d) * kStrip<C> + n) * Unit<C>::kDepth,
                  kLineRows * Unit<C>::kDepth);
    }
  }

  template <bool HAS_OFFSET>
  [[gnu::always_inline]] static void put_line(C* strip, const Table& table, const uint8_t* line, int k, int n,
                                              const RowValues& scale, const RowValues& offset) {
    for (int v = 0; v < kRowVectors; ++v) {
      const vi words = load_words(line + v * W * 4);
      const auto value = [&](auto at) {
        const vf code = line_value<KIND, decltype(at)::value>(table, words);
        return HAS_OFFSET ? fma(code, scale.v[v], offset.v[v]) : mul(code, scale.v[v]);
      };
      C* to = strip + static_cast<int64_t>(k) * kStrip<C> + (n + v * W) * Unit<C>::kDepth;
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

  void build(C* strip, C*, int64_t n0, int64_t k0, int k) const {
    alignas(64) float values[kStrip<C> * kLineRows];  // [column][row]
    const int columns = static_cast<int>(most(0, least(kStrip<C>, n_columns - n0)));
    const int width = depth_of<C>(k) * Unit<C>::kDepth;
    for (int d = 0; d < width; d += kLineRows) {
      if (d < k && columns > 0) {
        decode_lines<KIND>(values, kLineRows, w, (k0 + d) / kLineRows, n0, columns);
        for (int c = columns; c < kStrip<C>; ++c) fill_zero(values + c * kLineRows, kLineRows);
        // rows past the last one are padding of any value times scale 0, which NaN tables do not have
      } else {
        fill_zero(values, kStrip<C> * kLineRows);
      }
      for (int n = 0; n < kStrip<C>; n += W)
        for (int v = 0; v < kRowVectors; ++v) {
          if (d + v * W >= width) continue;
          vf square[W];
          for (int i = 0; i < W; ++i) square[i] = load(values + (n + i) * kLineRows + v * W);
          transpose(square);
          C* to = strip + static_cast<int64_t>(d + v * W) * kStrip<C> + n * Unit<C>::kDepth;
          for (int i = 0; i < W && d + v * W + i < width; i += Unit<C>::kDepth) {
            if constexpr (Unit<C>::kDepth == 1)
              store(to + i * kStrip<C>, square[i]);
            else
              store_pairs(to + i * kStrip<C>, square[i], square[i + 1]);
          }
        }
    }
  }
};

// --- the product ---

// What a thread needs for one item.
template <class C>
struct PanelScratch {
  C* left;      // kBlock rows of kLeftRow
  C* staged;    // kLineRows rows of kLeftRow
  C* panel;     // strips of kChunk depth
  C* update;    // strips of the low-rank product's depth
  float* sums;  // kTokensOfItem rows of kPanelLanes
  float* tile;  // kBlock rows of kStrip

  static constexpr int64_t kStrips = kPanelLanes / kStrip<C>;
  static constexpr int64_t kStripElements = kStrip<C> * int64_t{kChunk};

  // Returns the bytes; with nullptr it only measures.
  int64_t lay_out(char* at, int64_t update_depth) {
    char* const begin = at;
    const auto take = [&](int64_t bytes) {
      char* here = at;
      at += round_up(bytes, 64);
      return here;
    };
    left = reinterpret_cast<C*>(take(kBlock * kLeftRow * static_cast<int64_t>(sizeof(C))));
    staged = reinterpret_cast<C*>(take(kLineRows * kLeftRow * static_cast<int64_t>(sizeof(C))));
    panel = reinterpret_cast<C*>(take(kStrips * kStripElements * static_cast<int64_t>(sizeof(C))));
    update = reinterpret_cast<C*>(take(kPanelLanes * update_depth * static_cast<int64_t>(sizeof(C))));
    sums = reinterpret_cast<float*>(take(int64_t{kTokensOfItem + 16} * kPanelLanes * 4));
    tile = reinterpret_cast<float*>(take(int64_t{kBlock} * kStrip<C> * 4));
    return at - begin;
  }
};

// finish(sums of the block, first token, tokens) once a block's sums are whole.
template <class C, class Left, class Right, class Finish>
inline void panel_product(const Left& left, const Right& right, int64_t depth, int64_t t_begin, int64_t t_end,
                          int64_t n0, int lanes, const PanelScratch<C>& scratch, const Finish& finish) {
  const int strips = static_cast<int>((lanes + kStrip<C> - 1) / kStrip<C>);
  for (int64_t k0 = 0; k0 < most(depth, 1); k0 += kChunk) {
    const int k = static_cast<int>(least(kChunk, depth - k0));
    const int units = depth_of<C>(k);
    for (int s = 0; s < strips; ++s)
      right.build(scratch.panel + s * scratch.kStripElements, scratch.staged, n0 + s * kStrip<C>, k0, k);
    for (int64_t t = t_begin; t < t_end; t += kBlock) {
      const int rows = static_cast<int>(least(kBlock, t_end - t));
      const int padded = static_cast<int>(round_up(rows, Unit<C>::kRowStep));
      left.fill(scratch.left, t, rows, k0, k);
      float* sums = scratch.sums + (t - t_begin) * kPanelLanes;
      for (int s = 0; s < strips; ++s) {
        const C* b = scratch.panel + s * scratch.kStripElements;
        float* c = sums + s * kStrip<C>;
        if (k0 == 0)
          gemm<C, Start::zero>(padded, kStrip<C>, units, scratch.left, kLeftRow, b, kStrip<C>, c, kPanelLanes);
        else
          gemm<C, Start::add_to>(padded, kStrip<C>, units, scratch.left, kLeftRow, b, kStrip<C>, c,
                                 kPanelLanes);
      }
      if (k0 + kChunk >= depth) finish(sums, t, rows);
    }
  }
}

}  // namespace
}  // namespace tw
