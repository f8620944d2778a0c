// The contract of the norm kernels: normalised rows, rotary positions, gated activations, embeddings.
//
// Rows are of contiguous elements; the way from one row to the next is counted in elements.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace tw {

struct Rows {
  void* data;
  int64_t row;
};

// y = s r w + bias with s = x + residual, r = 1 / sqrt(mean of squares + eps), w = offset + weight;
// centred takes the mean of the row off s first.
struct NormCall {
  DType dtype;           // of x, residual, sum
  bool has_wide_weight;  // weight and bias are float, else dtype
  bool has_wide_y;       // y is float, else dtype
  bool is_centred;
  bool rounds_early;  // s r is rounded to dtype before it meets the weight
  int64_t n_rows, width;
  Rows x;
  Rows residual, sum;         // both null without a residual
  const void *weight, *bias;  // null: 1 and 0
  float offset, eps;
  Rows y;
  float *rstd, *mean;  // (n_rows) r, and the mean where centred; null: not wanted
  int threads;
};
void norm_forward(const NormCall& call);

struct NormBackwardCall {
  NormCall forward;        // x is what was normalised; y holds the gradient that comes in
  Rows dsum;               // added to dx; may be null
  Rows dx;                 // null: not wanted
  float *dweight, *dbias;  // (width); null: not wanted
  float* partials;         // norm_scratch_floats()
};
int64_t norm_blocks(int64_t n_rows, int64_t width);  // of rows whose sums are taken apart
bool norm_backward(NormBackwardCall call);           // false: no memory for scratch

// y[.., i], y[.., i + C] = x[i] c - x[i + C] s, x[i + C] c + x[i] s for the C columns of the tables; the rest
// is copied. Pairs are (2 i, 2 i + 1) if interleaved. y may be x.
struct RopeCall {
  DType dtype;
  bool has_wide_tables;  // float, and only y is rounded; else dtype, and each product is rounded as well
  bool is_interleaved;
  bool is_inverse;  // by the negative angle
  int64_t batch, length, n_heads, head_dim, n_angles;
  struct View {
    void* data;
    int64_t batch, token, head;
  } x, y;
  const void *cos, *sin;
  int64_t table_batch, table_row;
  const int64_t* positions;  // (batch, length) rows of the tables, or null: the token's own number
  int threads;
};
void rope(const RopeCall& call);

enum class Activation : int { silu, gelu, gelu_tanh };

// y = round(f(gate)) up
struct GatedCall {
  DType dtype;
  Activation activation;
  int64_t n_rows, width;
  Rows gate, up;
  Rows y;           // in the backward the gradient that comes in
  Rows dgate, dup;  // backward alone; null: not wanted
  int threads;
};
void gated_forward(const GatedCall& call);
void gated_backward(const GatedCall& call);

struct EmbeddingCall {
  int64_t n_ids, n_rows, row_bytes;
  const int64_t* ids;
  const void* weight;  // (n_rows, row_bytes)
  int64_t weight_row;  // in bytes
  void* y;
  int threads;
};
// The first place whose id is not a row, or -1.
int64_t first_stray(const int64_t* ids, int64_t n_ids, int64_t n_rows);
void embedding_forward(const EmbeddingCall& call);

// dweight[v] = sum of dy[t] over the t with ids[t] = v in their order, 0 at padding_row
struct EmbeddingBackwardCall {
  DType dtype;
  int64_t n_ids, n_rows, width;
  const int64_t* ids;
  int64_t padding_row;  // -1: none
  bool by_frequency;    // divided by the number of those t
  Rows dy;
  void* dweight;
  int threads;
  const int64_t* begins;  // (n_rows + 1): where a row's tokens begin in `tokens`
  const int64_t* tokens;  // (n_ids)
};
bool embedding_backward(EmbeddingBackwardCall call);  // begins and tokens are found here

#define TW_NORM_KERNELS(level)                                        \
  namespace level {                                                   \
  void norm_forward(const NormCall& call);                            \
  void norm_backward(const NormBackwardCall& call, int64_t n_blocks); \
  void rope(const RopeCall& call);                                    \
  void gated_forward(const GatedCall& call);                          \
  void gated_backward(const GatedCall& call);                         \
  void embedding_forward(const EmbeddingCall& call);                  \
  void embedding_backward(const EmbeddingBackwardCall& call);         \
  }
TW_NORM_KERNELS(portable)
TW_NORM_KERNELS(avx2)
TW_NORM_KERNELS(avx512)
TW_NORM_KERNELS(avx512_bf16)
TW_NORM_KERNELS(amx)
#undef TW_NORM_KERNELS

}  // namespace tw
