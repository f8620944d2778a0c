// Element types as calls name them.
#pragma once

namespace tw {

enum class DType : int { f32, bf16, f16 };

}  // namespace tw
