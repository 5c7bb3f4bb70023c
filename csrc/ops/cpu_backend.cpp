#include <ATen/Parallel.h>

#include "kernels/cpu/kernels.h"
#include "ops/backend.h"

namespace normfused::ops {

namespace {

// at::parallel_for obeys torch.set_num_threads, and is serial inside another parallel region.
constexpr cpu::Parallel kParallel{[](int64_t tasks, int64_t grain, cpu::Parallel::Body body, const void* context) {
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}};

template <class Args, void (*kernel)(const Args&, const cpu::Parallel&)>
void run(const Args& args, const at::Device&) {
  kernel(args, kParallel);
}

}  // namespace

const Backend kCpuBackend{
    run<BatchNormForward, cpu::batch_norm_training>,
    run<BatchNormForward, cpu::batch_norm_inference>,
    run<BatchNormBackward, cpu::batch_norm_backward>,
    run<ChannelStats, cpu::channel_moments>,
    run<ChannelStats, cpu::channel_sums>,
    run<PackMoments, cpu::pack_moments>,
    run<MergeRanks, cpu::merge_ranks>,
    run<Standardize, cpu::standardize>,
    [](const LocalResponseNorm& args, const at::Device&) {
      cpu::local_response_norm(args, kParallel);
      return true;
    },
};

}  // namespace normfused::ops
