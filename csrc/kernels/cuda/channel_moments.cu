#include "kernels/cuda/channel_stats_launch.cuh"

namespace normfused::cuda {

cudaError_t channel_moments(const ChannelStats& args, Resources& resources) {
  return for_floating(args.dtype, [&](auto type) {
    return channel_stats<MomentsOp<typename decltype(type)::type, true>>(args, resources);
  });
}

}  // namespace normfused::cuda
