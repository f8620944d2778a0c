// Lines of codes -> values: scales of sixteen rows, and tiles of W as the products of gemm_tile.h read them.
#pragma once

#include "common/gemm_tile.h"
#include "common/packed_weight.h"
#include "common/vec_codes.h"

namespace tw {
namespace {

constexpr int kRowVectors = kLineRows / W;  // vectors of a line's rows
constexpr double kSerialWeights = 3e4;      // to decode: below, a second thread costs more than it does

// The scale or offset of sixteen rows, as kRowVectors vectors.
struct RowValues {
  vf v[kRowVectors];
};

template <class S>
inline RowValues load_row_values(const void* values, int64_t at) {
  RowValues r;
  for (int i = 0; i < kRowVectors; ++i) r.v[i] = load(static_cast<const S*>(values) + at * kLineRows + i * W);
  return r;
}

inline RowValues nested_scales(const PackedWeight& w, int64_t block, int64_t group) {
  const uint8_t* codes = static_cast<const uint8_t*>(w.scales) + (block * w.groups + group) * kLineRows;
  RowValues r;
  for (int i = 0; i < kRowVectors; ++i) {
    float absmax[W];
    for (int lane = 0; lane < W; ++lane) {
      const int64_t row = block * kLineRows + i * W + lane;
      const int64_t at = (row * w.groups + group) / w.nested_block;
      // rows past the last one have no absmax of their own, and their results are not stored
      absmax[lane] = w.nested_absmax[at < w.nested_count ? at : w.nested_count - 1];
    }
    r.v[i] = fma(gather_bytes(w.nested_table, codes + i * W), load(absmax), set1(w.nested_offset));
  }
  return r;
}

inline RowValues scales_of(const PackedWeight& w, int64_t block, int64_t group) {
  const int64_t at = block * w.groups + group;
  switch (w.scale_type) {
    case ScaleType::f32:
      return load_row_values<float>(w.scales, at);
    case ScaleType::f16:
      return load_row_values<f16>(w.scales, at);
    case ScaleType::bf16:
      return load_row_values<bf16>(w.scales, at);
    default:
      return nested_scales(w, block, group);
  }
}

inline RowValues offsets_of(const PackedWeight& w, int64_t block, int64_t group) {
  const int64_t at = block * w.groups + group;
  switch (w.scale_type) {
    case ScaleType::f16:
      return load_row_values<f16>(w.offsets, at);
    case ScaleType::bf16:
      return load_row_values<bf16>(w.offsets, at);
    default:
      return load_row_values<float>(w.offsets, at);
  }
}

inline int64_t group_of(const PackedWeight& w, int64_t input) {
  return w.groups == 1 ? 0 : input / w.group_size;
}

// Values, without scale, of input K of a line: kRowVectors vectors.
template <Codes KIND, int K>
inline vf line_value(const Table& table, vi words) {
  if constexpr (KIND == Codes::table) {
    constexpr int kShift = K % 2 * 16 + K / 2 * 4;
    return table.at(shift_right(words, kShift));
  } else if constexpr (KIND == Codes::int8) {
    return signed_byte<K>(words);
  } else {
    return e4m3_byte<K>(words);
  }
}

template <int N>
struct Index {
  static constexpr int value = N;
};

// f(Index<K>{}) for each input K of a line
template <Codes KIND, class F>
[[gnu::always_inline]] inline void each_input(const F& f) {
  f(Index<0>{});
  f(Index<1>{});
  f(Index<2>{});
  f(Index<3>{});
  if constexpr (KIND == Codes::table) {
    f(Index<4>{});
    f(Index<5>{});
    f(Index<6>{});
    f(Index<7>{});
  }
}

// f(kind constant) for the kind of a weight
template <Codes KIND>
struct KindOf {
  static constexpr Codes value = KIND;
};
template <class F>
inline void by_kind(Codes kind, const F& f) {
  switch (kind) {
    case Codes::table:
      return f(KindOf<Codes::table>{});
    case Codes::int8:
      return f(KindOf<Codes::int8>{});
    default:
      return f(KindOf<Codes::e4m3>{});
  }
}

// f(input - k0, line, scale, offset) for each line of inputs [k0, k0 + k) of row block `block`; k0 starts a
// line. The offset means nothing where w.offsets is nullptr.
template <Codes KIND, class F>
[[gnu::always_inline]] inline void each_line(const PackedWeight& w, int64_t block, int64_t k0, int k,
                                             const F& f) {
  constexpr int kInputs = line_inputs(KIND);
  const uint8_t* line = w.codes + (block * w.lines + k0 / kInputs) * kLineBytes;
  int64_t next_group = k0;  // the input from which another scale holds
  RowValues scale, offset;
  for (int i = 0; i < k; i += kInputs, line += kLineBytes) {
    if (k0 + i >= next_group) {
      const int64_t group = group_of(w, k0 + i);
      next_group = w.groups == 1 ? INT64_MAX : (group + 1) * w.group_size;
      scale = scales_of(w, block, group);
      if (w.offsets) offset = offsets_of(w, block, group);
    }
    f(i, line, scale, offset);
  }
}

// Inputs [k0, k0 + k) of row block `block`, scaled, as floats: to[(input - k0) * ld + row], 16 rows. k0
// starts a line; inputs up to the end of the last line are written.
template <Codes KIND>
inline void decode_lines(float* to, int64_t ld, const PackedWeight& w, int64_t block, int64_t k0, int k) {
  const Table table(w.table);
  const auto decode = [&](int i, const uint8_t* line, const RowValues& scale, const RowValues& offset) {
    for (int v = 0; v < kRowVectors; ++v) {
      const vi words = load_words(line + v * W * 4);
      each_input<KIND>([&](auto at) {
        constexpr int K = decltype(at)::value;
        const vf value = line_value<KIND, K>(table, words);
        const vf scaled = w.offsets ? fma(value, scale.v[v], offset.v[v]) : mul(value, scale.v[v]);
        store(to + (i + K) * ld + v * W, scaled);
      });
    }
  };
  each_line<KIND>(w, block, k0, k, decode);
}

}  // namespace
}  // namespace tw
