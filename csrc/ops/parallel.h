// The loop of the CPU kernels on torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include "kernels/cpu/parallel.h"

namespace normfused::ops {

// at::parallel_for respects torch.set_num_threads and is serial inside another parallel region.
inline constexpr cpu::Parallel kCpuParallel{
    [](int64_t tasks, int64_t grain, cpu::Parallel::Body body, const void* context) {
      at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
    }};

// Whether that loop has more than one thread: the compiler must implement OpenMP if torch uses it.
#if defined(INTRA_OP_PARALLEL)
inline constexpr bool kUsesThreads = true;
#else
inline constexpr bool kUsesThreads = false;
#endif

}  // namespace normfused::ops
