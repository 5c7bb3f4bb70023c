// The parallel loop that kernels run on. The caller provides it, so kernels do not depend on a thread pool.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace normfused::cpu {

// Orders the non-temporal stores of this thread before its later stores.
static inline void nontemporal_fence() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

// Each range of tasks ends with a fence, so kernels may use non-temporal stores without one of their own. A fence after
// each task would take 8 % of the time of inference: it waits for stores that the next task could overlap with.
struct Parallel {
  using Body = void (*)(const void* context, int64_t begin, int64_t end);

  // Runs body(context, begin, end) over [0, tasks) in contiguous ranges of at least `grain` tasks. Returns when all
  // ranges are complete.
  void (*loop)(int64_t tasks, int64_t grain, Body body, const void* context);

  // Calls f(task) for each task in [0, tasks). Each thread runs its tasks in ascending order.
  template <class F>
  void operator()(int64_t tasks, int64_t grain, const F& f) const {
    const auto body = [](const void* context, int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) (*static_cast<const F*>(context))(task);
      nontemporal_fence();
    };
    loop(tasks, grain, body, &f);
  }

  // Calls f(begin, end) for contiguous ranges that cover [0, tasks), at most one for each thread.
  template <class F>
  void ranges(int64_t tasks, int64_t grain, const F& f) const {
    const auto body = [](const void* context, int64_t begin, int64_t end) {
      (*static_cast<const F*>(context))(begin, end);
      nontemporal_fence();
    };
    loop(tasks, grain, body, &f);
  }

  // Calls f(task) in descending order: a thread starts with the task that it read last, which is still in its cache.
  template <class F>
  void backwards(int64_t tasks, int64_t grain, const F& f) const {
    const auto body = [](const void* context, int64_t begin, int64_t end) {
      for (int64_t task = end; task-- > begin;) (*static_cast<const F*>(context))(task);
      nontemporal_fence();
    };
    loop(tasks, grain, body, &f);
  }
};

}  // namespace normfused::cpu
