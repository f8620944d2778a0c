// What the norm kernels share: who takes which rows, and rounding in between.
#pragma once

#include "common/extents.h"
#include "common/parallel.h"
#include "common/vec.h"

namespace tw {
namespace {

constexpr double kSerialBytes = 320 << 10;  // 20 to 30 microseconds of one core
constexpr int64_t kTakenBytes = 64 << 10;   // taken by a thread at a time

// body(begin, end) over [0, n_rows), in parallel where rows of `row_bytes` each are worth it.
template <class Body>
inline void over_rows(int64_t n_rows, int64_t row_bytes, int threads, const Body& body) {
  const int64_t taken_rows = most(1, kTakenBytes / most(1, row_bytes));
  if (threads <= 1 || n_rows <= taken_rows ||
      static_cast<double>(n_rows) * static_cast<double>(row_bytes) < kSerialBytes) {
    body(int64_t{0}, n_rows);
    return;
  }
  int64_t taken = 0;
  run_team(threads, [&](const Team&) {
    for (int64_t i; (i = take_next(&taken)) * taken_rows < n_rows;)
      body(i * taken_rows, least(n_rows, (i + 1) * taken_rows));
  });
}

template <class T>
inline T* row_of(const Rows& rows, int64_t i) {
  return rows.data ? static_cast<T*>(rows.data) + i * rows.row : nullptr;
}

// x as it would come back from memory.
template <class T>
inline vf rounded(vf x) {
  T narrow[W];
  store(narrow, x);
  return load(narrow);
}
template <>
inline vf rounded<float>(vf x) {
  return x;
}

// f(column, lanes) for whole vectors, then for the rest: lanes is W but for the last.
template <class F>
inline void over_columns(int64_t width, const F& f) {
  int64_t c = 0;
  for (; c + W <= width; c += W) f(c, [](auto* p) { return load(p); }, [](auto* p, vf v) { store(p, v); });
  if (c < width) {
    const int n = static_cast<int>(width - c);
    f(c, [n](auto* p) { return load_n(p, n); }, [n](auto* p, vf v) { store_n(p, v, n); });
  }
}

}  // namespace
}  // namespace tw
