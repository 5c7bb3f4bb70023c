#include "kernels/cpu/kernels.h"
#include "ops/backend.h"
#include "ops/parallel.h"

namespace normfused::ops {

namespace {

template <class Args, void (*kernel)(const Args&, const cpu::Parallel&)>
void run(const Args& args, const at::Device&) {
  kernel(args, kCpuParallel);
}

}  // namespace

const Backend kCpuBackend{
#define NF_KERNEL(name, Args) run<Args, cpu::name>,
#include "kernels/list.h"
    [](const LocalResponseNorm&) { return true; },
};

}  // namespace normfused::ops
