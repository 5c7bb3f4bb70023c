#include "kernels/cuda/sync_moments.cuh"

#include "kernels/cuda/launch.cuh"

namespace normfused::cuda {

cudaError_t pack_moments(const PackMoments& args, Resources& resources) {
  return for_floating(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const MomentsOp<T, false> moments{static_cast<const T*>(args.input), args.view, args.eps};
    const WriteMoments<compute_t<T>> write{args};
    const ReductionPlan plan = plan_for(moments, write, {sizeof(T), 1, all_aligned(args.input)}, resources);
    return reduce(moments, write, NoApply{}, plan, resources);
  });
}

cudaError_t merge_ranks(const MergeRanks& args, Resources& resources) {
  const cudaError_t error = args.is_double
                                ? for_each_channel(MergeChannel<double>{args}, args.channels, resources.stream)
                                : for_each_channel(MergeChannel<float>{args}, args.channels, resources.stream);
  if (error != cudaSuccess || args.num_batches_tracked == nullptr) return error;
  return for_each_channel(CountBatch{args.num_batches_tracked, args.count}, 1, resources.stream);
}

bool has_sm90_launches() { return may_overlap(each_channel<CountBatch>); }

}  // namespace normfused::cuda
