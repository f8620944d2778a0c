// Random numbers that any tile can draw again, from a counter and a key.
#pragma once

#include <stdint.h>

namespace tw {
namespace {

// Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words from a counter and a key.
struct Philox {
  uint32_t word[4];
  Philox() = default;
  Philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32), c3 = 0;
    for (int round = 0; round < 10; ++round) {
      const uint64_t wide0 = static_cast<uint64_t>(c0) * 0xD2511F53u,
                     wide2 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(wide2 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(wide2);
      c2 = static_cast<uint32_t>(wide0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(wide0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    word[0] = c0;
    word[1] = c1;
    word[2] = c2;
    word[3] = c3;
  }

  // of word w, in [0, 1)
  float uniform(int w) const { return static_cast<float>(word[w] >> 8) * 0x1p-24f; }
};

}  // namespace
}  // namespace tw
