#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/layer_norm_columns.cuh"
#include "kernels/cuda/layer_norm_rows.cuh"

namespace normfused::cuda {

namespace {

template <class T>
cudaError_t rows(const LayerNormForward& args, bool aligned, Resources& resources) {
  const ResidentRows rows = rows_of(args.view, args.samples, sizeof(T), aligned, args.residual == nullptr);
  const auto start = [&](const DeviceLimits& limits) {
    const ResidentRowsPlan plan = plan_resident_rows(rows, false, limits);
    return normalize_resident<values_per_access(sizeof(T))>(LayerRowsOp<T>{args}, plan, resources);
  };
  const cudaError_t error = start(resources.limits);
  if (error != kNoCluster) return error;
  DeviceLimits without_clusters = resources.limits;
  without_clusters.max_cluster = 1;
  return start(without_clusters);
}

template <class T>
cudaError_t columns(const LayerNormForward& args, bool aligned, Resources& resources) {
  const LayerColumnsPlan plan = plan_layer_columns(args.view, args.samples, sizeof(T), aligned, resources.limits);
  const LaunchConfig config{dim3(extent(args.view.outer * plan.tiles)), dim3(kThreads), resources.stream};
  return plan.values == 1 ? launch(config, layer_norm_columns<T, 1>, args, plan)
                          : launch(config, layer_norm_columns<T, layer_column_values(sizeof(T))>, args, plan);
}

}  // namespace

cudaError_t layer_norm(const LayerNormForward& args, Resources& resources) {
  const bool aligned = all_aligned(args.input, args.output, args.residual, args.sum, args.weight.data, args.bias.data);
  return for_floating(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return args.view.inner == 1 ? rows<T>(args, aligned, resources) : columns<T>(args, aligned, resources);
  });
}

}  // namespace normfused::cuda
