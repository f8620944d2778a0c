// A product of many tokens with a weight, panel by panel:
//
//   C[t][n] (float)  =  sum_k A[t][k] B[k][n]
//
// A panel of B is packed as gemm_tile.h reads it, in strips of kStrip lanes.
#pragma once

#include "common/arena.h"
#include "common/gemm_tile.h"
#include "common/packed_lines.h"
#include "common/philox.h"
#include "linear/eight_bits.h"
#include "linear/panel_extents.h"

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

// --- the left side: tokens ---

// Multiplies inputs [k0, k0 + k) of token t, as kept in `row`, by their dropout factors.
template <class C>
inline void drop_row(C* row, const LinearCall& call, int64_t t, int64_t k0, int k) {
  const float keep = 1.0f / (1.0f - call.dropout_p);
  int64_t drawn = -1;  // the four inputs that `draw` is of
  Philox draw;
  for (int i = 0; i < k; ++i) {
    const int64_t input = call.input_order ? call.input_order[k0 + i] : k0 + i;
    if (input / 4 != drawn) {
      drawn = input / 4;
      draw = Philox(call.dropout_seed, static_cast<uint32_t>(drawn), static_cast<uint32_t>(t), 0);
    }
    const float factor = draw.uniform(static_cast<int>(input % 4)) >= call.dropout_p ? keep : 0.0f;
    row[i] = from_float<C>(to_float(row[i]) * factor);
  }
}

// Rows of tokens as the left side of a product: block[row][k], kLeftRow apart, zeros past rows and k.
template <class T, class C>
struct Tokens {
  Rows rows;
  const float* factors = nullptr;       // of each k, or nullptr
  const LinearCall* dropout = nullptr;  // whose dropout applies, or nullptr
  const float* scales = nullptr;        // of each token: round to codes of 8 bits; or nullptr

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
      if (scales) round_to_codes(row, k, scales[t0 + r]);
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

// Tokens packed ahead, for all panels: [chunk of depth][token][kLeftRow]. Read row by row where they lie,
// they would be copied once a panel.
template <class C>
struct PackedLeft {
  C* data;
  int64_t tokens;  // a multiple of kBlock

  static PackedLeft measure(int64_t tokens) {
    return {nullptr, round_up(least(tokens, kTokensAtOnce), kBlock)};
  }
  int64_t elements(int64_t depth) const { return (depth + kChunk - 1) / kChunk * tokens * kLeftRow; }
  C* block(int64_t k0, int64_t token) const { return data + (k0 / kChunk * tokens + token) * kLeftRow; }
};

// Packs the `piece`-th block of a chunk, of tokens [t_begin, t_end); returns false past the last.
template <class T, class C>
inline bool pack_left(const PackedLeft<C>& to, const Tokens<T, C>& from, int64_t depth, int64_t t_begin,
                      int64_t t_end, int64_t piece) {
  const int64_t blocks = (t_end - t_begin + kBlock - 1) / kBlock;
  const int64_t k0 = piece / blocks * kChunk, t = piece % blocks * kBlock;
  if (k0 >= depth) return false;
  from.fill(to.block(k0, t), t_begin + t, static_cast<int>(least(kBlock, t_end - t_begin - t)), k0,
            static_cast<int>(least(kChunk, depth - k0)));
  return true;
}

// --- the right side: strips of kStrip lanes, [depth][lane] in units, zeros past n and k ---

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

// --- the product ---

// What a thread needs for one item.
template <class C>
struct PanelScratch {
  C* staged;     // kLineRows rows of kLeftRow
  C* panel;      // strips of kChunk depth
  C* update;     // strips of the low-rank product's depth
  float* sums;   // kTokensOfItem rows, padded to kRowStep, of kSumsRow
  float* tile;   // kBlock rows of kStrip
  float* delta;  // of D, of kDeltaTokens tokens and all lanes

  static constexpr int64_t kStrips = kPanelLanes / kStrip<C>;

  // Returns the bytes; with nullptr it only measures.
  int64_t lay_out(char* base, int64_t update_depth, bool has_delta) {
    Arena arena{base};
    staged = arena.take<C>(kLineRows * kLeftRow);
    panel = arena.take<C>(kStrips * kStripElements<C>);
    update = arena.take<C>(kPanelLanes * update_depth);
    sums = arena.take<float>((kTokensOfItem + Unit<C>::kRowStep) * kSumsRow);
    tile = arena.take<float>(int64_t{kBlock} * kStrip<C>);
    delta = arena.take<float>(has_delta ? int64_t{kPanelLanes} * kDeltaTokens : 0);
    return arena.at - base;
  }
};

// Tokens [t_begin, t_end) of `left` times a panel. finish(sums of the block, first token, tokens) once a
// block's sums are whole.
template <class C, class Right, class Finish>
inline void panel_product(const PackedLeft<C>& left, const Right& right, int64_t depth, int64_t t_begin,
                          int64_t t_end, int64_t n0, int lanes, const PanelScratch<C>& scratch,
                          const Finish& finish) {
  const int strips = static_cast<int>((lanes + kStrip<C> - 1) / kStrip<C>);
  for (int64_t k0 = 0; k0 < most(depth, 1); k0 += kChunk) {
    const int k = static_cast<int>(least(kChunk, depth - k0));
    const int units = depth_of<C>(k);
    right.build({scratch.panel, kStripElements<C>, scratch.staged}, n0, strips, k0, k);
    for (int64_t t = t_begin; t < t_end; t += kBlock) {
      const int rows = static_cast<int>(least(kBlock, t_end - t));
      const int padded = static_cast<int>(round_up(rows, Unit<C>::kRowStep));
      const C* a = left.block(k0, t);
      float* sums = scratch.sums + (t - t_begin) * kSumsRow;
      for (int s = 0; s < strips; ++s) {
        const C* b = scratch.panel + s * kStripElements<C>;
        float* c = sums + s * kStrip<C>;
        if (k0 == 0)
          gemm<C, Start::zero>(padded, kStrip<C>, units, a, kLeftRow, b, kStrip<C>, c, kSumsRow);
        else
          gemm<C, Start::add_to>(padded, kStrip<C>, units, a, kLeftRow, b, kStrip<C>, c, kSumsRow);
      }
      if (k0 + kChunk >= depth) finish(sums, t, rows);
    }
  }
}

}  // namespace
}  // namespace tw
