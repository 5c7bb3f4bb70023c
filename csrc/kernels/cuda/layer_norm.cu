#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/layer_norm_columns.cuh"
#include "kernels/cuda/layer_norm_rows.cuh"

namespace normfused::cuda {

namespace {

template <class T, int kValues, int kVectors>
cudaError_t start_rows(const LayerNormForward& args, const LayerRowsPlan& plan, Resources& resources) {
  const LaunchConfig config{dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.chunks)),
                            dim3(static_cast<unsigned>(plan.threads)), resources.stream};
  const auto start = [&](LayerPhase phase, Moments* parts) {
    return launch(config, layer_norm_rows<T, kValues, kVectors>, args, plan, phase, parts);
  };
  if (plan.chunks == 1) return start(LayerPhase::kBoth, nullptr);
  auto* const parts =
      static_cast<Moments*>(resources.scratch(args.view.outer * plan.chunks * static_cast<int64_t>(sizeof(Moments))));
  const cudaError_t error = start(LayerPhase::kSum, parts);
  return error != cudaSuccess ? error : start(LayerPhase::kApply, parts);
}

template <class T>
cudaError_t rows(const LayerNormForward& args, bool aligned, Resources& resources) {
  const LayerRowsPlan plan = plan_layer_rows(args.view, args.samples, sizeof(T), aligned, false, resources.limits);
  return for_layer_vectors<T, false>(
      plan, [&](auto values, auto vectors) { return start_rows<T, values(), vectors()>(args, plan, resources); });
}

template <class T>
cudaError_t columns(const LayerNormForward& args, bool aligned, Resources& resources) {
  const LayerColumnsPlan plan = plan_layer_columns(args.view, args.samples, sizeof(T), aligned, resources.limits);
  const LaunchConfig config{dim3(static_cast<unsigned>(args.view.outer * plan.tiles)), dim3(kThreads),
                            resources.stream};
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
