#include "kernels/cuda/layer_norm_columns.h"

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/layer_norm_columns.cuh"

namespace normfused::cuda {

namespace {

template <class T>
cudaError_t add_residuals_of(const LayerNormForward& args, bool aligned, const Resources& resources) {
  constexpr int kValues = values_per_access(sizeof(T));
  const bool vectors = aligned && args.view.numel() % kValues == 0;
  const int64_t threads = args.view.numel() / (vectors ? kValues : 1);
  const LaunchConfig config{dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads)), dim3(kThreads),
                            resources.stream};
  return vectors ? launch(config, add_residuals<T, kValues>, args) : launch(config, add_residuals<T, 1>, args);
}

template <class T>
cudaError_t columns(const LayerNormForward& args, bool aligned, Resources& resources) {
  using Normalize = LayerNormalizeOp<T>;
  using S = typename Normalize::S;
  const T* const input = static_cast<const T*>(args.residual == nullptr ? args.input : args.sum);
  if (args.residual != nullptr) {
    const cudaError_t error = add_residuals_of<T>(args, aligned, resources);
    if (error != cudaSuccess) return error;
  }
  const ChannelView view = columns_of_positions(args.view);
  S* const table = table_for<Normalize>(view, resources);
  const MomentsOp<T, false> moments{input, view, args.eps};
  const FinishLayers<S> finish{args, table};
  const Normalize normalize{args,
                            input,
                            static_cast<T*>(args.output),
                            table,
                            args.view.outer / args.samples,
                            Divider<uint64_t>(static_cast<uint64_t>(args.view.inner)),
                            Divider<uint64_t>(static_cast<uint64_t>(args.view.channels))};
  const ReductionPlan plan = plan_for(moments, finish, 1, aligned, true, resources);
  if (plan.single()) return reduce(moments, finish, normalize, plan, resources);
  const cudaError_t error = reduce(moments, finish, NoApply{}, plan, resources);
  return error != cudaSuccess ? error : apply_next(normalize, view, aligned, resources);
}

}  // namespace

cudaError_t layer_norm_columns(const LayerNormForward& args, bool aligned, Resources& resources) {
  return for_floating(args.dtype, [&](auto type) {
    return columns<typename decltype(type)::type>(args, aligned, resources);
  });
}

}  // namespace normfused::cuda
