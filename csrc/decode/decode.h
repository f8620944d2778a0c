// The contract of the decode kernels: a token from each row of logits, and sums over fused logits.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/rows.h"

namespace tw {

// Of a row, in the order of kernels/decode/problem.py.
struct SampleRule {
  double temperature, top_p, min_p, repetition, presence, frequency;
};
struct SampleChoice {
  int64_t top_k, seed, step;
};

struct SampleCall {
  DType dtype;
  int64_t n_rows, vocabulary;  // at most 2^31 - 1 tokens
  Rows logits;
  const SampleRule* rules;
  const SampleChoice* choices;
  const int64_t *prompt,
      *output;  // (n_rows, n_prompt), (n_rows, n_output): ids, negative ones count for nothing
  int64_t n_prompt, n_output;
  int64_t* tokens;    // -1: the row holds NaN, +inf, or nothing but -inf
  float* logprobs;    // null: not wanted
  int64_t row_bytes;  // of scratch for a thread; sample_tokens() fills in both
  char* scratch;
  int threads;
};
bool sample_tokens(SampleCall call);  // false: no memory for scratch

// sums[b] = log of the sum over v of exp(x), and mean and variance of d under its weights, where
// x = large[b, v] + d and d = sum over t of a[b, t] (tuned[t, b, v] - base[b, v]).
struct TiltCall {
  DType dtype;
  int64_t n_rows, vocabulary, n_experts;
  Rows large, base;
  const Rows* tuned;  // of each expert
  const double* a;    // (n_rows, n_experts)
  double* sums;       // (n_rows, 3)
  int threads;
};
void tilt(const TiltCall& call);

#define TW_DECODE_KERNELS(level)              \
  namespace level {                           \
  void sample_tokens(const SampleCall& call); \
  void tilt(const TiltCall& call);            \
  }
TW_DECODE_KERNELS(portable)
TW_DECODE_KERNELS(avx2)
TW_DECODE_KERNELS(avx512)
TW_DECODE_KERNELS(avx512_bf16)
TW_DECODE_KERNELS(amx)
#undef TW_DECODE_KERNELS

}  // namespace tw
