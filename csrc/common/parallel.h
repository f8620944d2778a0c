// Threads: OpenMP on whichever runtime torch has loaded, and one shared counter to deal out work.
#pragma once

#include <omp.h>
#include <stdint.h>

namespace tw {
namespace {

struct Team {
  int id;
  int size;
  void barrier() const {
#pragma omp barrier
  }
};

// body(Team) on `threads` threads at most; on the caller alone for 1.
template <class Body>
inline void run_team(int threads, const Body& body) {
  if (threads <= 1) {
    body(Team{0, 1});
    return;
  }
#pragma omp parallel num_threads(threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads()});
}

inline int64_t take_next(int64_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

}  // namespace
}  // namespace tw
