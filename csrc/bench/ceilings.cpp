// Measures at the best level of the machine, whatever level the kernels were forced to.
#include "bench/ceilings.h"

#include "common/isa.h"

namespace tw {

#if defined(TW_BUILT_X86_LEVELS)
#define TW_AT_BEST_LEVEL(call)                            \
  switch (best_isa()) {                                   \
    case Isa::amx: return amx::call;                      \
    case Isa::avx512_bf16: return avx512_bf16::call;      \
    case Isa::avx512: return avx512::call;                \
    case Isa::avx2: return avx2::call;                    \
    default: return portable::call;                       \
  }
#else
#define TW_AT_BEST_LEVEL(call) return portable::call;
#endif

double ceiling_fma(int64_t rounds, int threads) { TW_AT_BEST_LEVEL(ceiling_fma(rounds, threads)) }
double ceiling_bf16_dot(int64_t rounds, int threads) { TW_AT_BEST_LEVEL(ceiling_bf16_dot(rounds, threads)) }
double ceiling_int8_dot(int64_t rounds, int threads) { TW_AT_BEST_LEVEL(ceiling_int8_dot(rounds, threads)) }
double ceiling_read(const float* data, int64_t n, int streams, int threads, bool* known) {
  TW_AT_BEST_LEVEL(ceiling_read(data, n, streams, threads, known))
}

}  // namespace tw
