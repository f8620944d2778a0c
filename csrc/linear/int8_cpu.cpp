// Forward for many tokens with activations of 8 bits: whole numbers times whole numbers, 32-bit sums, and a
// scale for each group of inputs.
//
//   y[t][o] = row_scale[t] sum_g sum_{k in g} (scale[o][g] a[t][k] q[o][k] + offset[o][g] a[t][k])
//
// The vector instruction takes one unsigned operand: a + 128, and 128 sum q is taken off again where the sum
// starts. The matrix unit takes both signed. A call with a low-rank update is left to forward_cpu.cpp, which
// multiplies the same rounded tokens as it does others.
#include "common/arena.h"
#include "common/by_dtype.h"
#include "common/packed_lines.h"
#include "common/panel_extents.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "linear/eight_bits.h"

namespace tw {
namespace {

constexpr int kDot = 4;                        // inputs that one 32-bit sum takes at once
constexpr int kUnitInputs = kDot * kUnitTile;  // of a tile of the matrix unit
constexpr int kVectors = 4;                    // of a vector kernel's strip
constexpr int kStrip = kHasMatrixUnit ? 2 * kUnitTile : kVectors * W;  // lanes
constexpr int64_t kLeftRow = kChunk + 64;            // bytes: rows of a block start in different cache sets
constexpr int kLeastGroup = 8;                       // inputs, if there are several groups
constexpr int kMostSegments = kChunk / kLeastGroup;  // of a chunk, each with scales of its own
constexpr int kRows = 6;                             // of the vector kernel
constexpr int64_t kLeastUnitGroup = 256;  // below, converting the unit's sums costs more than it saves

// A panel of q: strips of [input / 4][lane][4] bytes, and what belongs to each segment of inputs.
struct BytePanel {
  int8_t* bytes;
  float *scales, *offsets;     // (segment, lane)
  int32_t* starts;             // (segment, lane): -128 times the segment's sum of q
  int ends[kMostSegments];     // of the segments, inputs of the chunk, whole lines
  bool closes[kMostSegments];  // whether a segment is its group's last
  int segments;
};

// What a thread needs for one item.
struct ByteScratch {
  BytePanel panel;
  float* sums;  // kTokensOfItem rows, padded to a block, of kSumsRow

  int64_t lay_out(char* base) {
    constexpr int64_t kSlots = int64_t{kPanelLanes} * kMostSegments;
    Arena arena{base};
    panel.bytes = arena.take<int8_t>(int64_t{kPanelLanes} * kChunk);
    panel.scales = arena.take<float>(kSlots);
    panel.offsets = arena.take<float>(kSlots);
    panel.starts = arena.take<int32_t>(kSlots);
    sums = arena.take<float>((kTokensOfItem + kBlock) * kSumsRow);
    return arena.at - base;
  }
};

// The tokens of one pass: [chunk][token][kLeftRow] bytes, and the sums of a over each group for offsets.
struct ByteTokens {
  uint8_t* bytes;
  float* group_sums;  // (token, group)
  int64_t tokens;     // a multiple of kBlock
};

template <class B>
struct Int8 {
  using U = ByteUnit<B>;
  using Sums = typename U::Sums;
  const LinearCall& call;
  const PackedWeight& w = call.packed;
  const bool in_nibbles = w.kind == Codes::table;
  const int inputs = line_inputs(w.kind);
  int8_t table[kTableCodes];  // codes as whole numbers
  float unit;                 // that they are multiples of

  explicit Int8(const LinearCall& c) : call(c) {
    float most_value = 0.0f;
    bool whole = true;
    for (float v : w.table) {
      const float size = v < 0 ? -v : v;
      most_value = size > most_value ? size : most_value;
      whole = whole && v == static_cast<float>(static_cast<int>(v));
    }
    unit = whole || !in_nibbles ? 1.0f : most_value / kMostCode;
    for (int i = 0; i < kTableCodes && in_nibbles; ++i) {
      const float q = w.table[i] / unit;
      table[i] = static_cast<int8_t>(q < 0 ? q - 0.5f : q + 0.5f);
    }
  }

  // --- panels ---

  void build(BytePanel& panel, int64_t n0, int strips, int64_t k0, int k) const {
    panel.segments = 0;
    for (int at = 0; at < k;) {
      const int64_t group = group_of(w, k0 + at);
      const int64_t end =
          w.groups == 1 ? call.in_features : least((group + 1) * w.group_size, call.in_features);
      const int to = static_cast<int>(least(k, end - k0));
      for (int n = 0; n < strips * kStrip; n += kLineRows) segment(panel, n0, n, k0, at, to, group);
      panel.closes[panel.segments] = k0 + to == end;
      panel.ends[panel.segments++] = static_cast<int>(round_up(to, inputs));
      at = to;
    }
  }

  // Sixteen rows of one segment, inputs [from, to) of the chunk.
  void segment(const BytePanel& panel, int64_t n0, int n, int64_t k0, int from, int to, int64_t group) const {
    int8_t* strip = panel.bytes + static_cast<int64_t>(n / kStrip) * kStrip * kChunk + n % kStrip * kDot;
    const int64_t slot = static_cast<int64_t>(panel.segments) * kPanelLanes + n;
    const int padded = static_cast<int>(round_up(to, kUnitInputs));
    if (n0 + n >= call.out_features) {
      for (int i = from; i < padded; i += kDot) U::store(strip + i * kStrip, U::none());
      store(panel.scales + slot, zero());
      if (w.offsets) store(panel.offsets + slot, zero());
      U::store(panel.starts + slot, Sums{});
      return;
    }
    const int64_t block = (n0 + n) / kLineRows;
    const uint8_t* line = w.codes + (block * w.lines + (k0 + from) / inputs) * kLineBytes;
    const int64_t ahead = n0 + n + kLineRows < call.out_features ? w.lines * kLineBytes : 0;
    Sums start{};
    int i = from;
    for (; i < to; i += inputs, line += kLineBytes) {
      const vi words = load_words(line);
      __builtin_prefetch(line + ahead, 0, 2);
      if (in_nibbles) {
        const vi low = U::low_nibbles(table, words), high = U::high_nibbles(table, words);
        U::store(strip + i * kStrip, low);
        U::store(strip + (i + kDot) * kStrip, high);
        start = U::less_128_times(U::less_128_times(start, low), high);
      } else {
        U::store(strip + i * kStrip, words);
        start = U::less_128_times(start, words);
      }
    }
    for (; i < padded; i += kDot) U::store(strip + i * kStrip, U::none());
    U::store(panel.starts + slot, start);
    store(panel.scales + slot, mul(scales_of(w, block, group).v[0], set1(unit)));
    if (w.offsets) store(panel.offsets + slot, offsets_of(w, block, group).v[0]);
  }

  // --- tokens ---

  template <class T>
  void pack_token(const ByteTokens& to, int64_t t, int64_t at, float scale) const {
    const T* x = static_cast<const T*>(call.x.data) + t * call.x.row;
    const int64_t n = call.in_features;
    const int bias = kHasMatrixUnit ? 0 : 128;
    for (int64_t i = 0; i < round_up(n, kUnitInputs); i += W) {
      vf codes = zero();
      if (i + W <= n)
        codes = eight_bit_code(load(x + i), scale);
      else if (i < n)
        codes = eight_bit_code(load_n(x + i, static_cast<int>(n - i)), scale);
      U::store_codes(to.bytes + (i / kChunk * to.tokens + at) * kLeftRow + i % kChunk, codes, bias,
                     in_nibbles);
    }
    for (int64_t group = 0; w.offsets && group < w.groups; ++group) {
      const int64_t begin = group * w.group_size, end = w.groups == 1 ? n : least(begin + w.group_size, n);
      vf sum_of = zero();
      for (int64_t i = begin; i < end; i += W)
        sum_of = add(sum_of, eight_bit_code(load_n(x + i, static_cast<int>(least(W, end - i))), scale));
      to.group_sums[at * w.groups + group] = sum(sum_of);
    }
  }

  // --- products ---

  // ROWS tokens times a strip, one segment, by vector instructions: sums (+)= scale (start + a b)
  template <int ROWS>
  static void segment_product(int depth, const uint8_t* a, const int8_t* b, const int32_t* starts,
                              const float* scales, bool first, float* sums) {
    Sums acc[ROWS][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[r][v] = U::load_sums(starts + v * W);
    for (int k = 0; k < depth; k += kDot) {
      vi lanes[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) lanes[v] = U::load(b + v * W * kDot);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const vi four = U::broadcast(a + r * kLeftRow + k);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) acc[r][v] = U::mac(acc[r][v], four, lanes[v]);
      }
      b += kStrip * kDot;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        float* at = sums + r * kSumsRow + v * W;
        const vf old = first ? zero() : load(at);
        store(at, fma(U::floats(acc[r][v]), load(scales + v * W), old));
      }
  }

  template <int ROWS>
  void vector_product(const BytePanel& panel, int s, const uint8_t* a, const float* group_sums, bool first,
                      float* sums) const {
    const int8_t* b = panel.bytes + static_cast<int64_t>(s) * kStrip * kChunk;
    int from = 0;
    for (int g = 0; g < panel.segments; ++g) {
      const int64_t slot = static_cast<int64_t>(g) * kPanelLanes + s * kStrip;
      segment_product<ROWS>(panel.ends[g] - from, a + from, b + from * kStrip, panel.starts + slot,
                            panel.scales + slot, first && g == 0, sums);
      if (w.offsets && panel.closes[g]) add_offsets(panel, slot, group_sums + g, ROWS, sums);
      from = panel.ends[g];
    }
  }

  void add_offsets(const BytePanel& panel, int64_t slot, const float* group_sums, int rows,
                   float* sums) const {
    for (int n = 0; n < kStrip; n += W) {
      const vf offset = load(panel.offsets + slot + n);
      for (int r = 0; r < rows; ++r) {
        float* at = sums + r * kSumsRow + n;
        store(at, fma(offset, set1(group_sums[r * w.groups]), load(at)));
      }
    }
  }

  // The same for a block of tokens by the matrix unit.
  void unit_product_of(const BytePanel& panel, int s, const uint8_t* a, const float* group_sums, bool first,
                       float* sums) const {
    alignas(64) int32_t whole[2 * kUnitTile * 2 * kUnitTile];
    const int8_t* b = panel.bytes + static_cast<int64_t>(s) * kStrip * kChunk;
    int from = 0;
    for (int g = 0; g < panel.segments; ++g) {
      const int64_t slot = static_cast<int64_t>(g) * kPanelLanes + s * kStrip;
      if constexpr (kHasMatrixUnit)
        unit_product<2, 2, false>(static_cast<int>(round_up(panel.ends[g] - from, kUnitInputs)) / kDot,
                                  reinterpret_cast<const int8_t*>(a) + from, kLeftRow, b + from * kStrip,
                                  kStrip, whole, 2 * kUnitTile);
      for (int n = 0; n < kStrip; n += W) {
        const vf scale = load(panel.scales + slot + n);
        for (int r = 0; r < kBlock; ++r) {
          float* at = sums + r * kSumsRow + n;
          const vf old = first && g == 0 ? zero() : load(at);
          store(at, fma(U::floats(U::load_sums(whole + r * 2 * kUnitTile + n)), scale, old));
        }
      }
      if (w.offsets && panel.closes[g]) add_offsets(panel, slot, group_sums + g, kBlock, sums);
      from = panel.ends[g];
    }
  }

  void block_product(const BytePanel& panel, int strips, const uint8_t* a, const float* group_sums,
                     bool first, float* sums) const {
    for (int s = 0; s < strips; ++s)
      if constexpr (kHasMatrixUnit)
        unit_product_of(panel, s, a, group_sums, first, sums + s * kStrip);
      else
        for (int r = 0; r < kBlock; r += kRows)
          vector_product<kRows>(panel, s, a + r * kLeftRow, group_sums ? group_sums + r * w.groups : nullptr,
                                first, sums + r * kSumsRow + s * kStrip);
  }

  template <class T>
  void finish_block(const float* sums, const float* row_scales, int64_t t0, int rows, int64_t n0,
                    int lanes) const {
    for (int r = 0; r < rows; ++r)
      for (int n = 0; n < lanes; n += W) {
        const int some = static_cast<int>(least(W, lanes - n));
        vf y = mul(load(sums + r * kSumsRow + n), set1(row_scales[t0 + r]));
        if (call.bias) y = add(y, load_n(call.bias + n0 + n, some));
        if (call.out_scale) y = mul(y, load_n(call.out_scale + n0 + n, some));
        store_n(static_cast<T*>(call.y.data) + (t0 + r) * call.y.row + n0 + n, y, some);
      }
  }
};

template <class T, class B>
bool int8_forward(const LinearCall& call) {
  const Int8<B> product(call);
  const PackedWeight& w = call.packed;
  const int64_t tokens = round_up(least(call.tokens, kTokensAtOnce), kBlock);
  const int64_t chunks = (call.in_features + kChunk - 1) / kChunk;
  const int64_t panels = (call.out_features + kPanelLanes - 1) / kPanelLanes;
  ByteTokens left{nullptr, nullptr, tokens};
  float* row_scales = nullptr;
  const auto lay_out = [&](char* base) {
    Arena arena{base};
    left.bytes = arena.take<uint8_t>(chunks * tokens * kLeftRow);
    row_scales = arena.take<float>(call.tokens);
    left.group_sums = arena.take<float>(w.offsets ? tokens * w.groups : 0);
    return arena.at - base;
  };
  ByteScratch measure;
  const int64_t own_bytes = measure.lay_out(nullptr);
  char* workspace = take_workspace(lay_out(nullptr) + call.threads * own_bytes);
  if (!workspace) return false;
  char* const of_threads = workspace + lay_out(workspace);
  if (!w.offsets) left.group_sums = nullptr;
  int64_t items_taken = 0;
  run_team(call.threads, [&](const Team& team) {
    const MatrixUnit unit_is_ready;
    ByteScratch scratch;
    scratch.lay_out(of_threads + team.id * own_bytes);
    BytePanel& panel = scratch.panel;
    for (int64_t begin = 0; begin < call.tokens; begin += kTokensAtOnce) {
      const int64_t n_tokens = least(kTokensAtOnce, call.tokens - begin);
      for (int64_t t = team.id; t < n_tokens; t += team.size) {
        const T* x = static_cast<const T*>(call.x.data) + (begin + t) * call.x.row;
        const float scale = eight_bit_scale(x, call.in_features);
        row_scales[begin + t] = scale;
        product.template pack_token<T>(left, begin + t, t, scale);
      }
      team.barrier();
      const int64_t token_items = (n_tokens + kTokensOfItem - 1) / kTokensOfItem;
      for (int64_t item; (item = take_next(&items_taken)) < panels * token_items;) {
        const int64_t n0 = item / token_items * kPanelLanes, t_begin = item % token_items * kTokensOfItem;
        const int64_t t_end = least(t_begin + kTokensOfItem, n_tokens);
        const int lanes = static_cast<int>(least(kPanelLanes, call.out_features - n0));
        const int strips = (lanes + kStrip - 1) / kStrip;
        for (int64_t k0 = 0; k0 < call.in_features; k0 += kChunk) {
          const int k = static_cast<int>(least(kChunk, call.in_features - k0));
          product.build(panel, n0, strips, k0, k);
          const int64_t group = group_of(w, k0);
          for (int64_t t = t_begin; t < t_end; t += kBlock) {
            float* block = scratch.sums + (t - t_begin) * kSumsRow;
            product.block_product(panel, strips, left.bytes + (k0 / kChunk * tokens + t) * kLeftRow,
                                  left.group_sums ? left.group_sums + t * w.groups + group : nullptr, k0 == 0,
                                  block);
            if (k0 + kChunk >= call.in_features)
              product.template finish_block<T>(block, row_scales, begin + t,
                                               static_cast<int>(least(kBlock, t_end - t)), n0, lanes);
          }
        }
      }
      team.barrier();
      if (team.id == 0) items_taken = 0;
      team.barrier();
    }
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool linear_int8(const LinearCall& call, bool* fits) {
  return by_dtype(call.dtype, [&](auto x) {
    using T = decltype(x);
    if constexpr (kHasByteDot && sizeof(T) > 0) {  // dependent: other levels have no ByteUnit to compile
      const int64_t group = call.packed.group_size;
      const bool long_groups =
          call.packed.groups == 1 || (group >= kLeastUnitGroup && group % kUnitInputs == 0);
      *fits = call.in_features > 0 && call.rank == 0 && !call.delta.offsets && !call.delta_sums &&
              (!kHasMatrixUnit || long_groups);
      return !*fits || int8_forward<T, int8_t>(call);
    } else {
      *fits = false;
      return true;
    }
  });
}

}  // namespace TW_ISA
}  // namespace tw
