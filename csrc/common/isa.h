// The CPU levels that the kernels are compiled for, and the choice among them at run time.
#pragma once

namespace tw {

// Ordered: a machine that runs one level runs all below it.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

// The best level that is both built and supported by this processor.
Isa best_isa();

// Whether this build holds the kernels of a level (non-x86 builds hold `portable` alone).
bool isa_is_built(Isa isa);

// The level in use until set_isa() is called: the fastest, which is best_isa() with one exception.
Isa current_isa();

// Take another level from now on. Returns false, and changes nothing, if it is above best_isa().
bool set_isa(Isa isa);

}  // namespace tw
