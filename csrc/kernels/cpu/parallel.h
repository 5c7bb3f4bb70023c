// How kernels use several threads without knowing whose they are: the caller lends a parallel loop.
#pragma once

#include <cstdint>

namespace normfused::cpu {

struct Parallel {
  using Body = void (*)(const void* context, int64_t begin, int64_t end);

  // Runs body over [0, tasks) in contiguous ranges of at least `grain` tasks; returns when all are done.
  void (*loop)(int64_t tasks, int64_t grain, Body body, const void* context);

  // Calls f(task) for every task.
  template <class F>
  void operator()(int64_t tasks, int64_t grain, const F& f) const {
    const auto body = [](const void* context, int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) (*static_cast<const F*>(context))(task);
    };
    loop(tasks, grain, body, &f);
  }

  // The same, each thread from its last task to its first.
  template <class F>
  void backwards(int64_t tasks, int64_t grain, const F& f) const {
    const auto body = [](const void* context, int64_t begin, int64_t end) {
      for (int64_t task = end; task-- > begin;) (*static_cast<const F*>(context))(task);
    };
    loop(tasks, grain, body, &f);
  }
};

}  // namespace normfused::cpu
