// A drop-in for the CPU backend that runs the CUDA kernels in the simulator, so that the operators' CPU tests also test
// the CUDA kernels.
#include "ops/backend.h"

#include "kernels/cpu/kernels.h"
#include "resources.h"

namespace normfused {

namespace {

// A small device: tensors of a few thousand values are split, and large outputs are streamed.
constexpr cuda::DeviceLimits kDevice{4, 1 << 20, true};

template <class Args, cudaError_t (*kernel)(const Args&, cuda::Resources&)>
void run(const Args& args, const at::Device&) {
  testing::HostResources resources(kDevice);
  TORCH_CHECK(kernel(args, resources) == cudaSuccess, "the launch failed");
  TORCH_CHECK(resources.tickets_are_zero(), "a ticket is not zero after the launch");
}

}  // namespace

const char* cpu::capability() { return "cuda"; }

const ops::Backend ops::kCpuBackend{
#define NF_KERNEL(name, Args) run<Args, cuda::name>,
#include "kernels/list.h"
    [](const LocalResponseNorm& args) { return cuda::plan_windows(args).chunk > 0; },
};

}  // namespace normfused
