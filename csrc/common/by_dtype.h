// From a call's element type to a template argument.
#pragma once

#include "common/dtype.h"
#include "common/vec.h"

namespace tw {
namespace {

// f(T{}) for the T of a call's tensors. With a matrix unit that is bf16: all else runs one level below.
template <class F>
inline bool by_dtype(DType dtype, const F& f) {
  if constexpr (kHasMatrixUnit) {
    return f(bf16{});
  } else {
    switch (dtype) {
      case DType::f32:
        return f(float{});
      case DType::bf16:
        return f(bf16{});
      default:
        return f(f16{});
    }
  }
}

}  // namespace
}  // namespace tw
