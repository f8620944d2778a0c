// A packed weight as rows of numbers: lines are decoded with a row in each lane and then turned.
#include "common/packed_lines.h"
#include "common/parallel.h"
#include "quant/quant.h"

namespace tw {
namespace {

constexpr int kColumns = 64;  // decoded at a time: whole lines, and whole vectors

// Sixteen rows from `block` on.
template <class T, Codes KIND>
void decode_block(const DecodeWeightCall& call, int64_t block) {
  alignas(64) float values[kColumns * kLineRows];  // [column][row]
  for (int64_t k0 = 0; k0 < call.in_features; k0 += kColumns) {
    const int columns = static_cast<int>(least(kColumns, call.in_features - k0));
    decode_lines<KIND>(values, kLineRows, call.weight, block, k0, columns);
    for (int c = 0; c < columns; c += W)
      for (int v = 0; v < kLineRows; v += W) {
        vf square[W];
        for (int i = 0; i < W; ++i) square[i] = load(values + (c + i) * kLineRows + v);
        transpose(square);
        for (int i = 0; i < W && block * kLineRows + v + i < call.out_features; ++i) {
          T* to = static_cast<T*>(call.to) + (block * kLineRows + v + i) * call.row + k0 + c;
          if (columns - c >= W)
            store(to, square[i]);
          else
            store_n(to, square[i], columns - c);
        }
      }
  }
}

template <class T>
void decode(const DecodeWeightCall& call) {
  const int64_t blocks = (call.out_features + kLineRows - 1) / kLineRows;
  const double weights = static_cast<double>(call.out_features) * static_cast<double>(call.in_features);
  int64_t taken = 0;
  run_team(weights < kSerialWeights ? 1 : call.threads, [&](const Team&) {
    by_kind(call.weight.kind, [&](auto kind) {
      for (int64_t block; (block = take_next(&taken)) < blocks;)
        decode_block<T, decltype(kind)::value>(call, block);
    });
  });
}

}  // namespace

namespace TW_ISA {

void decode_weight(const DecodeWeightCall& call) {
  switch (call.dtype) {
    case DType::f32:
      return decode<float>(call);
    case DType::bf16:
      return decode<bf16>(call);
    default:
      return decode<f16>(call);
  }
}

}  // namespace TW_ISA
}  // namespace tw
