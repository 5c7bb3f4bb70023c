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
