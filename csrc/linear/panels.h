// A product of many tokens with a weight, panel by panel:
//
//   C[t][n] (float)  =  sum_k A[t][k] B[k][n]
//
// A panel of B is packed as gemm_tile.h reads it, in strips of kStrip lanes.
#pragma once

#include "common/arena.h"
#include "common/panels.h"
#include "common/philox.h"
#include "linear/eight_bits.h"

namespace tw {
namespace {

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

// Tokens [t_begin, t_end) of `left` times a panel, on top of the sums there unless it is the first product.
// finish(sums of the block, first token, tokens) once a block's sums are whole.
template <class C, class Right, class Finish>
inline void panel_product(const PackedLeft<C>& left, const Right& right, int64_t depth, int64_t t_begin,
                          int64_t t_end, int64_t n0, int lanes, const PanelScratch<C>& scratch, bool is_first,
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
        if (k0 == 0 && is_first)
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
