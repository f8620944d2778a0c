#include "common/workspace.h"

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tw {

namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kHugePage = int64_t{2} << 20;

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
  if (kept.block && bytes <= kKeptBytes) {  // what is too large to keep leaves the kept one alone
    char* block = kept.block;
    kept.block = nullptr;
    if (bytes_of(block) >= bytes) return block;
    Kept::release(block);
  }
  void* raw = nullptr;
  const size_t size = static_cast<size_t>(bytes + kAlignment);
  const bool is_large = bytes > kKeptBytes;  // fresh at every call: a fault for each 4 KiB shows
  if (posix_memalign(&raw, is_large ? kHugePage : kAlignment, size) != 0) return nullptr;
#if defined(__linux__)
  if (is_large) madvise(raw, size, MADV_HUGEPAGE);  // a refusal costs time alone
#endif
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
