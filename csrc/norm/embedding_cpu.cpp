// Rows of an embedding, and the gradient of its weight: each row is written once, by one thread, from its
// tokens in their order.
#include <string.h>

#include "common/by_dtype.h"
#include "norm/norm.h"
#include "norm/rows.h"

namespace tw {
namespace {

constexpr int64_t kColumns = 1024;  // added up at a time, 4 KiB of sums

template <class T>
void add_row(const EmbeddingBackwardCall& call, int64_t v) {
  T* to = static_cast<T*>(call.dweight) + v * call.width;
  const int64_t begin = call.begins[v], end = call.begins[v + 1], n = end - begin;
  if (n == 0 || v == call.padding_row) {
    memset(static_cast<void*>(to), 0, static_cast<size_t>(call.width) * sizeof(T));
    return;
  }
  const vf count = set1(call.by_frequency ? static_cast<float>(n) : 1.0f);
  float sums[kColumns];
  for (int64_t c0 = 0; c0 < call.width; c0 += kColumns) {
    const int64_t columns = least(kColumns, call.width - c0);
    for (int64_t i = begin; i < end; ++i) {
      const T* dy = row_of<const T>(call.dy, call.tokens[i]) + c0;
      over_columns(columns, [&](int64_t c, auto ld, auto st) {
        const vf so_far = i == begin ? zero() : ld(sums + c);
        st(sums + c, add(so_far, ld(dy + c)));
      });
    }
    over_columns(columns, [&](int64_t c, auto ld, auto st) { st(to + c0 + c, div(ld(sums + c), count)); });
  }
}

}  // namespace

namespace TW_ISA {

void embedding_forward(const EmbeddingCall& call) {
  over_rows(call.n_ids, 2 * call.row_bytes, call.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      memcpy(static_cast<char*>(call.y) + t * call.row_bytes,
             static_cast<const char*>(call.weight) + call.ids[t] * call.weight_row,
             static_cast<size_t>(call.row_bytes));
  });
}

void embedding_backward(const EmbeddingBackwardCall& call) {
  by_dtype(call.dtype, [&](auto t) {
    using T = decltype(t);
    over_rows(call.n_rows, call.width * static_cast<int64_t>(sizeof(T)), call.threads,
              [&](int64_t begin, int64_t end) {
                for (int64_t v = begin; v < end; ++v) add_row<T>(call, v);
              });
    return true;
  });
}

}  // namespace TW_ISA
}  // namespace tw
