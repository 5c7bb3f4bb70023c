// Puts the CUDA kernels, run by the simulator, where the operators expect the CPU's: so all that is tested of the
// operators on a CPU is tested of the CUDA kernels too.
#include "ops/backend.h"

#include "kernels/cpu/kernels.h"
#include "resources.h"

namespace normfused {

namespace {

// A small device: tensors of some thousand values are split, and large ones are streamed.
constexpr cuda::DeviceLimits kDevice{4, 1 << 20, true};

template <class Args, cudaError_t (*kernel)(const Args&, cuda::Resources&)>
void run(const Args& args, const at::Device&) {
  testing::HostResources resources(kDevice);
  TORCH_CHECK(kernel(args, resources) == cudaSuccess, "not started");
  TORCH_CHECK(resources.tickets_are_zero(), "a ticket is not zero at the end");
}

}  // namespace

const char* cpu::capability() { return "cuda"; }

const ops::Backend ops::kCpuBackend{
    run<BatchNormForward, cuda::batch_norm_training>,
    run<BatchNormForward, cuda::batch_norm_inference>,
    run<BatchNormBackward, cuda::batch_norm_backward>,
    run<ChannelStats, cuda::channel_moments>,
    run<ChannelStats, cuda::channel_sums>,
    run<PackMoments, cuda::pack_moments>,
    run<MergeRanks, cuda::merge_ranks>,
    run<Standardize, cuda::standardize>,
    [](const LocalResponseNorm& args, const at::Device& device) {
      if (cuda::plan_windows(args).chunk == 0) return false;
      run<LocalResponseNorm, cuda::local_response_norm>(args, device);
      return true;
    },
};

}  // namespace normfused
