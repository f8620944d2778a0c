// The contract of the loss kernels: what a block of logits says about its tokens, and its gradient in place.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/rows.h"

namespace tw {

// Of each row x_i = cap tanh(scale (logit_i + bias_i) / cap), without a cap x_i = scale (logit_i + bias_i):
//   largest = max x,  mass = sum exp(x_i - largest),  lse = largest + log mass
//   log_probs[k] = x_ids[k] - lse                                         0 where ids[k] is negative
//   total = sum class_weight_i (x_i - lse)                                class_weight 1 if null
// and, where a gradient is wanted, of
//   loss = sum_k for_ids[k] log_probs[k] + for_total total + for_lse lse + for_square lse^2
// the gradient with respect to the logits, rounded once, over them.
struct HeadRowsCall {
  DType dtype;  // of the logits
  int64_t n_rows, n_classes, n_ids;
  Rows logits;
  const float *bias, *class_weight;  // (n_classes) or null
  float class_weight_sum;            // n_classes if null
  float scale, cap;                  // cap 0: none
  const int64_t* ids;                // (n_rows, n_ids), each below n_classes
  bool has_stats;                    // largest and mass are read, not found
  float *largest, *mass;             // (n_rows)
  float* log_probs;                  // (n_rows, n_ids)
  float* total;                      // (n_rows) or null: not wanted
  bool wants_gradient;
  float* at_ids;                                            // (n_rows, n_ids) scratch
  const float *for_ids, *for_total, *for_lse, *for_square;  // as log_probs; the rest (n_rows) or null: 0
  int threads;
};
void head_rows(const HeadRowsCall& call);

#define TW_LOSS_KERNELS(level)              \
  namespace level {                         \
  void head_rows(const HeadRowsCall& call); \
  }
TW_LOSS_KERNELS(portable)
TW_LOSS_KERNELS(avx2)
TW_LOSS_KERNELS(avx512)
TW_LOSS_KERNELS(avx512_bf16)
TW_LOSS_KERNELS(amx)
#undef TW_LOSS_KERNELS

}  // namespace tw
