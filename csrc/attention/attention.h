// The contract of the attention kernels: pointers, extents and strides. See kernels/attention/README.md for
// the equations.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace tw {

// A tensor (batch, row, head, lane); strides in elements, any sign, zero included.
struct View {
  void* data;
  int64_t batch, row, head, lane;
};

// Which keys a query sees, and what happens to its scores.
struct Rule {
  float scale;
  float softcap;  // 0: none
  bool is_causal;
  bool wraparound;
  int64_t window_left;  // -1: unlimited
  int64_t window_right;
  int64_t group_size;  // 0: no segments
  int first_shifted_head;
  float dropout_p;
  uint64_t dropout_seed;
};

// One batch row, or one packed document. Positions below count from its own first query or key; query i
// stands at key position i + n_k - n_q.
struct Document {
  int64_t batch;  // which row of q, k, v
  int64_t q_begin, n_q;
  int64_t k_begin, n_k;
  int64_t live_begin, live_end;  // keys outside are hidden; segments count from live_begin
  const uint8_t* live;           // n_k flags, or nullptr if all of [live_begin, live_end) is live
};

struct AttentionCall {
  DType dtype;
  View q, k, v, out;  // out has q's row and head axes
  float* lse;         // (batch, head, row), contiguous
  int64_t n_rows;     // rows of q in each batch row: the stride of lse
  int n_heads, n_kv_heads, head_dim, value_dim;
  const Document* documents;
  int64_t n_documents;
  Rule rule;
  const float* sinks;  // (head), or nullptr
  int threads;
};

struct BackwardCall {
  AttentionCall forward;  // out and lse are inputs here
  View dout;
  const float* dlse;  // as lse, or nullptr
  View dq, dk, dv;    // written where wanted, every element; data is nullptr otherwise
};

// One to a few queries a row over a cache that may be cut into pages.
struct DecodeCall {
  DType dtype;
  View q, k, v, out;  // k, v: (row of the batch or page, slot, head, lane)
  float* lse;
  int64_t n_rows;  // queries a batch row
  int64_t batch;
  int n_heads, n_kv_heads, head_dim, value_dim;
  const int32_t* page_table;  // (batch, pages_per_row), or nullptr: one page, `batch` of them
  int64_t pages_per_row, page_size;
  const int32_t* key_starts;   // (batch)
  const int32_t* key_lengths;  // (batch)
  const uint8_t* live;         // (batch, page_size) flags, or nullptr; without page_table only
  Rule rule;                   // scale, softcap, is_causal, windows
  const float* sinks;
  int splits;  // 0: as many as threads
  int threads;
};

// The last n_tokens of each row's key_lengths: from k and v (batch, token, head, lane) into a cache as above.
struct AppendCall {
  int64_t itemsize;
  View k, v, k_cache, v_cache;
  int64_t batch, n_tokens;
  int n_heads, head_dim, value_dim;
  const int32_t* page_table;
  int64_t pages_per_row, page_size;
  const int32_t* key_lengths;  // the new tokens counted in
};
void attention_append(const AppendCall& call);

// Each returns false if scratch memory cannot be had.
bool attention_forward(const AttentionCall& call);
bool attention_backward(const BackwardCall& call);
bool attention_decode(const DecodeCall& call);

#define TW_ATTENTION_KERNELS(level)                  \
  namespace level {                                  \
  bool attention_forward(const AttentionCall& call); \
  bool attention_backward(const BackwardCall& call); \
  bool attention_decode(const DecodeCall& call);     \
  }
TW_ATTENTION_KERNELS(portable)
TW_ATTENTION_KERNELS(avx2)
TW_ATTENTION_KERNELS(avx512)
TW_ATTENTION_KERNELS(avx512_bf16)
TW_ATTENTION_KERNELS(amx)
#undef TW_ATTENTION_KERNELS

}  // namespace tw
