// Forward for a few tokens in whole numbers, where there is a dot product of bytes: one instruction takes
// four inputs of sixteen rows. Tokens and tables of codes become one or two bytes each,
//
//   x = step (128 high + low)             a step for each segment of inputs: 15 bits of its largest x; or
//   x = step high                         int8_activations: one step a row
//   value(code) = unit (byte - 128 + low / 128)
//
// and 128 times the other operand's sum is taken off again, which lets the instruction have its one unsigned
// operand. Of the four products of parts low times low is left out: it is below 2^-14 of the largest. So y
// differs from the product of unrounded bf16 x by much less than the rounding of y to bf16.
#include "common/by_dtype.h"
#include "linear/eight_bits.h"
#include "linear/few_tokens.h"

namespace tw {
namespace {

constexpr int64_t kSegment = 128;      // inputs at most that share a step and are summed up in 32 bits
constexpr int64_t kBytesAhead = 2048;  // of prefetching along a row block
constexpr float kHighParts = 128.0f;
constexpr float kMostHigh = 127.0f;
// of a table in 15 bits: a multiple of 192, so that fp4 and e2m1 are exact
constexpr float kMostOfTable = 84.0f * 192.0f;

// What the codes of a table stand for.
struct ByteTable {
  uint8_t high[kTableCodes] = {}, low[kTableCodes] = {};
  float unit = 1.0f;
  bool has_low = false;

  ByteTable(const PackedWeight& w, bool int8_activations) {
    if (w.kind != Codes::table) return;
    float most = 0.0f;
    bool whole = true;
    for (float v : w.table) {
      most = v > most ? v : (-v > most ? -v : most);
      whole = whole && v == static_cast<float>(static_cast<int>(v));
    }
    has_low = !whole && !int8_activations;
    if (!whole) unit = has_low ? most * kHighParts / kMostOfTable : most / kMostCode;
    const float parts = has_low ? kHighParts : 1.0f;
    for (int i = 0; i < kTableCodes; ++i) {
      const float q = w.table[i] / unit * parts;
      const int rounded = static_cast<int>(q < 0 ? q - 0.5f : q + 0.5f) + 128 * static_cast<int>(parts);
      high[i] = static_cast<uint8_t>(rounded / static_cast<int>(parts));
      low[i] = static_cast<uint8_t>(rounded % static_cast<int>(parts));
    }
  }
};

// A token's share of one segment.
struct Segment {
  float step;         // times the table's unit
  float sum;          // of x, for offsets
  int32_t high, low;  // -128 times the sums of its bytes
};

int64_t segments_of(const LinearCall& call) {
  const PackedWeight& w = call.packed;
  const int64_t whole = w.groups == 1 ? call.in_features : w.group_size;
  return w.groups * ((whole + kSegment - 1) / kSegment);
}

// f(begin, end, group, segment) for each segment of inputs, in order
template <class F>
[[gnu::always_inline]] inline void each_segment(const LinearCall& call, const F& f) {
  const PackedWeight& w = call.packed;
  int64_t begin = 0, segment = 0;
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t end = w.groups == 1 ? call.in_features : least(begin + w.group_size, call.in_features);
    while (begin < end) {
      const int64_t to = least(begin + kSegment, end);
      f(begin, to, group, segment++);
      begin = to;
    }
  }
}

// The step of x = step q, |q| <= most. An infinity makes it infinite, and q then says where (codes_of); a NaN
// makes it NaN.
template <class T>
float step_of(const T* x, int64_t n, float most) {
  vf largest = zero(), nan = zero();
  for (int64_t i = 0; i < n; i += W) {
    const vf value = load_n(x + i, static_cast<int>(least(W, n - i)));
    largest = max(abs(value), largest);
    nan = add(nan, select(le(abs(value), set1(__builtin_inff())), zero(), value));
  }
  return largest_of(largest) / most + sum(nan);
}

inline vf codes_of(vf x, float step) {
  if (!(step > 0.0f)) return zero();
  if (step > __FLT_MAX__) {  // infinities alone count
    const vf is_infinite = select(lt(set1(__FLT_MAX__), abs(x)), set1(1.0f), zero());
    return mul(is_infinite, sign_of(set1(1.0f), x));
  }
  return round_nearest(div(x, set1(step)));
}

// Tokens as rows of bytes, `ld` a row: PLANES rows a token, high and low.
template <class B, int PLANES>
struct ByteTokens {
  const ByteTable& table;
  const int count;  // whole passes
  uint8_t* bytes = nullptr;
  Segment* segments = nullptr;
  int64_t ld = 0, n_segments = 0;

  ByteTokens(const ByteTable& t, int64_t n) : table(t), count(static_cast<int>(n)) {}

  void lay_out(Arena& arena, const LinearCall& call) {
    ld = round_up(call.in_features + W, kRowUnit);  // a segment's last vector may reach past it
    n_segments = segments_of(call);
    bytes = arena.take<uint8_t>(count * PLANES * ld);
    segments = arena.take<Segment>(count * n_segments);
  }

  const uint8_t* row(int t, int plane) const { return bytes + (t * PLANES + plane) * ld; }

  template <class T>
  void pack(const LinearCall& call, int t, const T* x) const {
    const bool in_nibbles = call.packed.kind == Codes::table;
    const int bias = in_nibbles ? 0 : 128;  // 8-bit codes are the signed operand
    uint8_t* high = bytes + t * PLANES * ld;
    Segment* to = segments + t * n_segments;
    memset(high, 0, static_cast<size_t>(PLANES * ld));
    if (!x) {
      memset(to, 0, static_cast<size_t>(n_segments) * sizeof(Segment));
      return;
    }
    const float row_step = PLANES == 1 ? eight_bit_scale(x, call.in_features) : 0.0f;
    each_segment(call, [&](int64_t begin, int64_t end, int64_t, int64_t segment) {
      const float step = PLANES == 1 ? row_step : step_of(x + begin, end - begin, kMostHigh * kHighParts);
      vf sums[2] = {zero(), zero()};
      for (int64_t i = begin; i < end; i += W) {
        const vf value = load_n(x + i, static_cast<int>(least(W, end - i)));
        if constexpr (PLANES == 1) {
          const vf q = eight_bit_code(value, step);
          B::store_codes(high + i, q, bias, in_nibbles);
          sums[0] = add(sums[0], q);
        } else {
          const vf q = codes_of(value, step);
          const vf parts[2] = {round_nearest(mul(q, set1(1 / kHighParts))), zero()};
          const vf rest = fma(parts[0], set1(-kHighParts), q);
          B::store_codes(high + i, parts[0], bias, in_nibbles);
          B::store_codes(high + ld + i, rest, bias, in_nibbles);
          sums[0] = add(sums[0], parts[0]);
          sums[1] = add(sums[1], rest);
        }
      }
      const float of_high = sum(sums[0]), of_low = sum(sums[1]);
      const float q_sum = PLANES == 1 ? of_high : of_high * kHighParts + of_low;
      to[segment] = {step * table.unit, step * q_sum, -128 * static_cast<int32_t>(of_high),
                     -128 * static_cast<int32_t>(of_low)};
    });
  }
};

// Lines of codes as bytes, and how they meet PLANES bytes of a token: sums of high times high, and of the
// rest.
template <class B, bool IN_NIBBLES, bool HAS_LOW, int PLANES>
struct ByteLine {
  static constexpr int kInputs = IN_NIBBLES ? 8 : 4;
  using Sums = typename B::Sums;
  vi part[2], low[2];  // of 4 inputs each

  [[gnu::always_inline]] ByteLine(const ByteTable& table, vi words) {
    if constexpr (IN_NIBBLES) {
      const auto* high_table = reinterpret_cast<const int8_t*>(table.high);
      part[0] = B::low_nibbles(high_table, words);
      part[1] = B::high_nibbles(high_table, words);
    } else {
      part[0] = words;
    }
    if constexpr (HAS_LOW) {
      const auto* low_table = reinterpret_cast<const int8_t*>(table.low);
      low[0] = B::low_nibbles(low_table, words);
      low[1] = B::high_nibbles(low_table, words);
    }
  }

  [[gnu::always_inline]] static Sums mac(Sums acc, vi codes, const uint8_t* x) {
    return IN_NIBBLES ? B::mac(acc, codes, B::broadcast(x)) : B::mac(acc, B::broadcast(x), codes);
  }

  [[gnu::always_inline]] void add(Sums (&acc)[PLANES], const uint8_t* x, int64_t ld) const {
#pragma GCC unroll 2
    for (int half = 0; half < kInputs / 4; ++half) {
      const uint8_t* four = x + half * 4;
      acc[0] = mac(acc[0], part[half], four);
      if constexpr (PLANES == 2) acc[1] = mac(acc[1], part[half], four + ld);
      if constexpr (HAS_LOW) acc[1] = mac(acc[1], low[half], four);
    }
  }
};

// y of TOKENS tokens from t0 on, of BLOCKS row blocks from `block` on.
template <class T, class Line, int TOKENS, int BLOCKS, class Tokens, class B, int PLANES>
void byte_blocks(const LinearCall& call, const Tokens& few, const float* hidden, int t0, int64_t block) {
  using Sums = typename B::Sums;
  constexpr bool kInNibbles = Line::kInputs == 8;
  const PackedWeight& w = call.packed;
  const ByteTable table = few.table;
  vf sums[BLOCKS][TOKENS];
  for (auto& of_block : sums)
    for (vf& sum : of_block) sum = zero();
  const uint8_t* line = w.codes + block * w.lines * kLineBytes;

  each_segment(call, [&](int64_t begin, int64_t end, int64_t group, int64_t segment) {
    Sums acc[BLOCKS][TOKENS][PLANES], code_sums[BLOCKS];
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) {
      code_sums[b] = Sums{};
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) {
        const Segment& of = few.segments[(t0 + t) * few.n_segments + segment];
        acc[b][t][0] = B::all(kInNibbles ? of.high : 0);
        if constexpr (PLANES == 2) acc[b][t][1] = B::all(kInNibbles ? of.low : 0);
      }
    }
    for (int64_t i = begin; i < end; i += Line::kInputs, line += kLineBytes)
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; ++b) {
        __builtin_prefetch(line + b * w.lines * kLineBytes + kBytesAhead, 0, 2);
        const vi words = load_words(line + b * w.lines * kLineBytes);
        const Line codes(table, words);
        if constexpr (!kInNibbles) code_sums[b] = B::less_128_times(code_sums[b], words);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) codes.add(acc[b][t], few.row(t0 + t, 0) + i, few.ld);
      }
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) {
      const vf scale = scales_of(w, block + b, group).v[0];
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) {
        const Segment& of = few.segments[(t0 + t) * few.n_segments + segment];
        vf part = B::floats(kInNibbles ? acc[b][t][0] : acc[b][t][0] + code_sums[b]);
        if constexpr (PLANES == 2) {
          const Sums rest = kInNibbles ? acc[b][t][1] : acc[b][t][1] + code_sums[b];
          part = fma(part, set1(kHighParts), B::floats(rest));
        }
        sums[b][t] = fma(mul(part, set1(of.step)), scale, sums[b][t]);
        if (w.offsets) sums[b][t] = fma(offsets_of(w, block + b, group).v[0], set1(of.sum), sums[b][t]);
      }
    }
  });

  for (int b = 0; b < BLOCKS; ++b)
    for (int t = 0; t < TOKENS && t0 + t < call.tokens; ++t)
      finish_outputs<T>(call, hidden, t0 + t, (block + b) * kLineRows, sums[b][t]);
}

template <class T, class Line, class B, int PLANES, int PASS, int BLOCKS>
bool passes(const LinearCall& call, const ByteTable& table) {
  using Few = ByteTokens<B, PLANES>;
  const Few tokens(table, round_up(call.tokens, PASS));
  return with_few_tokens<T>(call, tokens, [&](const Few& few, const float* hidden, const Team& team) {
    share_blocks<BLOCKS>(call, team, [&](auto blocks, int64_t block) {
      for (int t0 = 0; t0 < few.count; t0 += PASS)
        byte_blocks<T, Line, PASS, decltype(blocks)::value, Few, B, PLANES>(call, few, hidden, t0, block);
    });
  });
}

template <class T, class B, bool IN_NIBBLES, bool HAS_LOW, int PLANES>
bool by_tokens(const LinearCall& call, const ByteTable& table) {
  using Line = ByteLine<B, IN_NIBBLES, HAS_LOW, PLANES>;
  if (call.tokens <= 1) return passes<T, Line, B, PLANES, 1, 4>(call, table);
  if (call.tokens <= 2) return passes<T, Line, B, PLANES, 2, 4>(call, table);
  if (call.tokens <= 4) return passes<T, Line, B, PLANES, 4, 2>(call, table);
  return passes<T, Line, B, PLANES, 8, 1>(call, table);
}

// A template, so that levels without a dot product of bytes drop the body.
template <class T, class B>
bool in_bytes([[maybe_unused]] const LinearCall& call) {
  if constexpr (kHasByteDot) {
    const ByteTable table(call.packed, call.int8_activations);
    const bool in_nibbles = call.packed.kind == Codes::table;
    if (call.int8_activations)
      return in_nibbles ? by_tokens<T, B, true, false, 1>(call, table)
                        : by_tokens<T, B, false, false, 1>(call, table);
    if constexpr (sizeof(typename ComputeType<T>::type) == 2) {
      if (!in_nibbles) return by_tokens<T, B, false, false, 2>(call, table);
      return table.has_low ? by_tokens<T, B, true, true, 2>(call, table)
                           : by_tokens<T, B, true, false, 2>(call, table);
    }
  }
  return false;
}

}  // namespace

namespace TW_ISA {

bool linear_byte_rows(const LinearCall& call) {
  return by_dtype(call.dtype, [&](auto x) { return in_bytes<decltype(x), ByteUnit<int8_t>>(call); });
}

}  // namespace TW_ISA
}  // namespace tw
