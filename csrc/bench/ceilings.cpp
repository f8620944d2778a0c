// Measures at the level in use.
#include "bench/ceilings.h"

#include "common/at_level.h"

namespace tw {

double ceiling_fma(int64_t rounds, int threads) { TW_AT_LEVEL(current_isa(), ceiling_fma, rounds, threads) }
double ceiling_bf16_dot(int64_t rounds, int threads) {
  TW_AT_LEVEL(current_isa(), ceiling_bf16_dot, rounds, threads)
}
double ceiling_int8_dot(int64_t rounds, int threads) {
  TW_AT_LEVEL(current_isa(), ceiling_int8_dot, rounds, threads)
}
double ceiling_read(const float* data, int64_t n, int streams, int threads, bool* known) {
  TW_AT_LEVEL(current_isa(), ceiling_read, data, n, streams, threads, known)
}

}  // namespace tw
