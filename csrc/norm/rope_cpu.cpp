// Rotary positions: the heads of one token share an angle row, read once.
//
// Compiled without contraction of products and sums, so that each is rounded as torch rounds it.
#include <string.h>

#include "common/by_dtype.h"
#include "norm/norm.h"
#include "norm/rows.h"

namespace tw {
namespace {

// Table is T, and products are rounded to it as well, or float.
template <class T, class Table>
struct Rotation {
  static constexpr bool kRoundsProducts = sizeof(Table) == sizeof(T);
  static vf product(vf a, vf b) {
    if constexpr (kRoundsProducts)
      return rounded<T>(mul(a, b));
    else
      return mul(a, b);
  }

  static void halves(const T* x, T* y, const Table* cos, const Table* sin, int64_t n, vf sign) {
    over_columns(n, [&](int64_t c, auto ld, auto st) {
      const vf a = ld(x + c), b = ld(x + n + c), co = ld(cos + c), si = mul(ld(sin + c), sign);
      const vf low = sub(product(a, co), product(b, si)), high = add(product(b, co), product(a, si));
      st(y + c, low);
      st(y + n + c, high);
    });
  }

  static void pairs(const T* x, T* y, const Table* cos, const Table* sin, int64_t n, vf sign) {
    float even[W], odd[W];
    over_columns(n, [&](int64_t c, auto ld, auto) {
      const int lanes = static_cast<int>(least(W, n - c));
      for (int i = 0; i < W; ++i) {
        even[i] = i < lanes ? to_float(x[2 * (c + i)]) : 0.0f;
        odd[i] = i < lanes ? to_float(x[2 * (c + i) + 1]) : 0.0f;
      }
      const vf a = load(even), b = load(odd), co = ld(cos + c), si = mul(ld(sin + c), sign);
      store(even, sub(product(a, co), product(b, si)));
      store(odd, add(product(b, co), product(a, si)));
      for (int i = 0; i < lanes; ++i) {
        y[2 * (c + i)] = from_float<T>(even[i]);
        y[2 * (c + i) + 1] = from_float<T>(odd[i]);
      }
    });
  }
};

template <class T, class Table>
void rotate(const RopeCall& call) {
  const int64_t n = call.n_angles, rest = call.head_dim - 2 * n;
  const vf sign = set1(call.is_inverse ? -1.0f : 1.0f);
  const int64_t token_bytes = 2 * call.n_heads * call.head_dim * static_cast<int64_t>(sizeof(T));
  over_rows(call.batch * call.length, token_bytes, call.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / call.length, t = i % call.length;
      const int64_t place =
          call.positions ? call.positions[i] * call.table_row : b * call.table_batch + t * call.table_row;
      const Table* cos = static_cast<const Table*>(call.cos) + place;
      const Table* sin = static_cast<const Table*>(call.sin) + place;
      const T* x = static_cast<const T*>(call.x.data) + b * call.x.batch + t * call.x.token;
      T* y = static_cast<T*>(call.y.data) + b * call.y.batch + t * call.y.token;
      for (int64_t h = 0; h < call.n_heads; ++h, x += call.x.head, y += call.y.head) {
        if (call.is_interleaved)
          Rotation<T, Table>::pairs(x, y, cos, sin, n, sign);
        else
          Rotation<T, Table>::halves(x, y, cos, sin, n, sign);
        if (rest && x != y) memcpy(y + 2 * n, x + 2 * n, static_cast<size_t>(rest) * sizeof(T));
      }
    }
  });
}

}  // namespace

namespace TW_ISA {

void rope(const RopeCall& call) {
  by_dtype(call.dtype, [&](auto t) {
    using T = decltype(t);
    if (call.has_wide_tables)
      rotate<T, float>(call);
    else
      rotate<T, T>(call);
    return true;
  });
}

}  // namespace TW_ISA
}  // namespace tw
