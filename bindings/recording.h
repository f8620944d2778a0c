// Kernel calls kept to be made again. While a thread records, a call that its bindings would hand to a kernel
// is kept instead of made: addresses and extents stay those of that time, what lies there is free to change.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <utility>
#include <vector>

namespace tw {

class Recording {
 public:
  void append(std::function<void()> call) { calls_.push_back(std::move(call)); }
  size_t size() const { return calls_.size(); }
  void run() const {
    pybind11::gil_scoped_release release;
    for (const auto& call : calls_) call();
  }

 private:
  std::vector<std::function<void()>> calls_;
};

// The one that this thread records into, or nullptr.
inline Recording*& current_recording() {
  thread_local Recording* current = nullptr;
  return current;
}

template <class Call>
inline void make_or_record(Call call) {
  if (Recording* recording = current_recording()) {
    recording->append(std::move(call));
    return;
  }
  pybind11::gil_scoped_release release;
  call();
}

}  // namespace tw
