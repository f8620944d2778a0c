#include "common/workspace.h"

#include <cstdlib>

namespace tw {

namespace {

constexpr int64_t kAlignment = 64;

struct Header {  // lies in the kAlignment bytes before the block
  int64_t bytes;
};

struct Kept {
  char* block = nullptr;
  ~Kept() { release(block); }
  static void release(char* block) {
    if (block) std::free(block - kAlignment);
  }
};

thread_local Kept kept;

int64_t bytes_of(const char* block) { return reinterpret_cast<const Header*>(block - kAlignment)->bytes; }

}  // namespace

char* take_workspace(int64_t bytes) {
  if (kept.block) {
    char* block = kept.block;
    kept.block = nullptr;
    if (bytes_of(block) >= bytes) return block;
    Kept::release(block);
  }
  void* raw = nullptr;
  if (posix_memalign(&raw, kAlignment, static_cast<size_t>(bytes + kAlignment)) != 0) return nullptr;
  static_cast<Header*>(raw)->bytes = bytes;
  return static_cast<char*>(raw) + kAlignment;
}

void give_workspace(char* block) {
  if (!kept.block && bytes_of(block) <= kKeptBytes)
    kept.block = block;
  else
    Kept::release(block);
}

}  // namespace tw
