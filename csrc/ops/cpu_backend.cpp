#include <ATen/Parallel.h>

#include "kernels/cpu/kernels.h"
#include "ops/backend.h"

namespace normfused::ops {

namespace {

// at::parallel_for respects torch.set_num_threads and is serial inside another parallel region.
constexpr cpu::Parallel kParallel{[](int64_t tasks, int64_t grain, cpu::Parallel::Body body, const void* context) {
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}};

template <class Args, void (*kernel)(const Args&, const cpu::Parallel&)>
void run(const Args& args, const at::Device&) {
  kernel(args, kParallel);
}

}  // namespace

const Backend kCpuBackend{
#define NF_KERNEL(name, Args) run<Args, cpu::name>,
#include "kernels/list.h"
    [](const LocalResponseNorm&) { return true; },
};

}  // namespace normfused::ops
