#include "common/isa.h"

namespace tw {

namespace {

Isa detect() {
#if defined(__x86_64__) && defined(TW_BUILT_X86_LEVELS)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!avx2) return Isa::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return Isa::avx2;
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return bf16 ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::portable;
#endif
}

Isa g_current = detect();

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[kIsaCount] = {"portable", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(isa)];
}

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

bool isa_is_built(Isa isa) {
#if defined(TW_BUILT_X86_LEVELS)
  return true;
#else
  return isa == Isa::portable;
#endif
}

Isa current_isa() { return g_current; }

bool set_isa(Isa isa) {
  if (isa > best_isa()) return false;
  g_current = isa;
  return true;
}

}  // namespace tw
