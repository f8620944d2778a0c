// The squares of all gradients, added up chunk by chunk.
#include "common/by_dtype.h"
#include "optim/chunks.h"

namespace tw {
namespace {

constexpr int64_t kRun = 2048;  // elements that are added in float before their sum goes into a double

template <class T>
double squares_of(const T* x, int64_t n) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = least(n, begin + kRun);
    vf acc[4] = {zero(), zero(), zero(), zero()};
    int64_t i = begin;
    for (; i + 4 * W <= end; i += 4 * W)
      for (int j = 0; j < 4; ++j) {
        const vf v = load(x + i + j * W);
        acc[j] = fma(v, v, acc[j]);
      }
    for (; i < end; i += W) {
      const vf v = load_n(x + i, static_cast<int>(least(W, end - i)));
      acc[0] = fma(v, v, acc[0]);
    }
    total += static_cast<double>(sum(add(add(acc[0], acc[1]), add(acc[2], acc[3]))));
  }
  return total;
}

}  // namespace

namespace TW_ISA {

void sum_of_squares(const SquaresCall& call, const int64_t* first_chunks, double* sums) {
  by_dtype(call.dtype, [&](auto t) {
    using T = decltype(t);
    over_chunks([&](int64_t i) { return call.items[i].n; }, first_chunks, call.n_items, call.threads,
                [&](int64_t item, int64_t begin, int64_t end, int64_t chunk) {
                  sums[chunk] = squares_of(static_cast<const T*>(call.items[item].data) + begin, end - begin);
                });
    return true;
  });
}

}  // namespace TW_ISA
}  // namespace tw
