#include "kernels/cuda/channel_stats_launch.cuh"

namespace normfused::cuda {

cudaError_t channel_sums(const ChannelStats& args, Resources& resources) {
  return for_floating(args.dtype,
                      [&](auto type) { return channel_stats<SumsOp<typename decltype(type)::type>>(args, resources); });
}

}  // namespace normfused::cuda
