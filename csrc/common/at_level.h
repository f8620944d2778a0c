// From a call to the kernels of the level in use.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace tw {
namespace {

// The matrix unit multiplies bf16: everything else runs one level below.
[[maybe_unused]] Isa isa_for(DType dtype) {
  const Isa isa = current_isa();
  return isa == Isa::amx && dtype != DType::bf16 ? Isa::avx512_bf16 : isa;
}

}  // namespace
}  // namespace tw

// Returns what `function` of the level returns.
#if defined(TW_BUILT_X86_LEVELS)
#define TW_AT_LEVEL(isa, function, ...)          \
  switch (isa) {                                 \
    case Isa::amx:                               \
      return amx::function(__VA_ARGS__);         \
    case Isa::avx512_bf16:                       \
      return avx512_bf16::function(__VA_ARGS__); \
    case Isa::avx512:                            \
      return avx512::function(__VA_ARGS__);      \
    case Isa::avx2:                              \
      return avx2::function(__VA_ARGS__);        \
    default:                                     \
      return portable::function(__VA_ARGS__);    \
  }
#else
#define TW_AT_LEVEL(isa, function, ...) return portable::function(__VA_ARGS__);
#endif
