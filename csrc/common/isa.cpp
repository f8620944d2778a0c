#include "common/isa.h"

#if defined(TW_BUILT_X86_LEVELS)
#include <cpuid.h>
#endif
#if defined(TW_BUILT_X86_LEVELS) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tw {

namespace {

#if defined(TW_BUILT_X86_LEVELS)

// Tile registers with bf16 and int8 products, and the kernel's leave to use them.
bool has_amx() {
#if defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
  // a process has to ask once before its first use; ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool is_intel() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_INTEL_ebx;
}

#endif

Isa detect() {
#if defined(TW_BUILT_X86_LEVELS)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!avx2) return Isa::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
  return has_amx() ? Isa::amx : Isa::avx512_bf16;
#else
  return Isa::portable;
#endif
}

// Intel's dot product of bf16 pairs runs at half the rate of two float fmas (a Xeon with AMX measured 245 and
// 490 GFLOP/s), AMD's at the same rate for twice the work: there bf16 is quicker computed as float.
Isa fastest() {
#if defined(TW_BUILT_X86_LEVELS)
  if (best_isa() == Isa::avx512_bf16 && is_intel()) return Isa::avx512;
#endif
  return best_isa();
}

Isa g_current = fastest();

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[kIsaCount] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
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
