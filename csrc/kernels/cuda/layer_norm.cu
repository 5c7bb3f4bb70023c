#include "kernels/cuda/layer_norm_columns.cuh"
#include "kernels/cuda/layer_norm_rows.cuh"
#include "kernels/cuda/launch.cuh"

namespace normfused::cuda {

namespace {

// --- rows

template <class T, int kValues, int kVectors>
cudaError_t start_rows(const LayerNormForward& args, const LayerRowsPlan& plan, Resources& resources) {
  const LaunchConfig config{dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.chunks)),
                            dim3(static_cast<unsigned>(plan.threads)), resources.stream};
  const auto start = [&](LayerPhase phase, Moments* parts) {
    return launch(config, layer_norm_rows<T, kValues, kVectors>, args, plan, phase, parts);
  };
  if (plan.chunks == 1) return start(LayerPhase::kBoth, nullptr);
  auto* const parts = static_cast<Moments*>(
      resources.scratch(args.view.outer * plan.chunks * static_cast<int64_t>(sizeof(Moments))));
  const cudaError_t error = start(LayerPhase::kSum, parts);
  return error != cudaSuccess ? error : start(LayerPhase::kApply, parts);
}

template <class T>
cudaError_t rows(const LayerNormForward& args, bool aligned, Resources& resources) {
  constexpr int kBytes = sizeof(compute_t<T>), kValues = values_per_access(sizeof(T));
  constexpr int kFew = layer_vectors(kBytes, kValues, false, true), kMany = layer_vectors(kBytes, kValues, false, false);
  constexpr int kManySingle = layer_vectors(kBytes, 1, false, false);
  const LayerRowsPlan plan = plan_layer_rows(args.view, args.samples, sizeof(T), aligned, false, resources.limits);
  if (plan.values == 1)
    return plan.vectors == kFew ? start_rows<T, 1, kFew>(args, plan, resources)
                                : start_rows<T, 1, kManySingle>(args, plan, resources);
  return plan.vectors == kFew ? start_rows<T, kValues, kFew>(args, plan, resources)
                              : start_rows<T, kValues, kMany>(args, plan, resources);
}

// --- columns

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

cudaError_t layer_norm(const LayerNormForward& args, Resources& resources) {
  const bool aligned =
      all_aligned(args.input, args.output, args.residual, args.sum, args.weight.data, args.bias.data);
  return for_floating(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return args.view.inner == 1 ? rows<T>(args, aligned, resources) : columns<T>(args, aligned, resources);
  });
}

}  // namespace normfused::cuda
