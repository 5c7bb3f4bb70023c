#include "kernels/cuda/batch_norm.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/layer_norm_columns.cuh"
#include "kernels/cuda/layer_norm_rows.cuh"

namespace normfused::cuda {

namespace {

// The sums over rows or columns of each block, for the gradients of weight and bias: (samples * blocks, 2, channels).
template <class S>
struct ParameterSums {
  const LayerNormBackward& args;
  const int64_t blocks;  // of one sample
  S* data;               // null if no such gradient is requested

  ParameterSums(const LayerNormBackward& args, int64_t blocks, Resources& resources) : args(args), blocks(blocks) {
    const int64_t bytes = args.samples * blocks * 2 * args.view.channels * static_cast<int64_t>(sizeof(S));
    data = args.grad_weight || args.grad_bias ? static_cast<S*>(resources.scratch(bytes)) : nullptr;
  }

  // Adds up those of all blocks and writes the gradients.
  cudaError_t write(Resources& resources) const {
    if (data == nullptr) return cudaSuccess;
    const int64_t channels = args.view.channels, count = args.samples * 2 * channels;
    auto* const results = static_cast<double*>(resources.scratch(4 * count * static_cast<int64_t>(sizeof(double))));
    const DType dtype = sizeof(S) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
    const ChannelStats stats{ChannelView{blocks, 2 * channels, 1, args.samples},
                             dtype,
                             data,
                             {results, results + count, results + 2 * count, results + 3 * count}};
    cudaError_t error = channel_sums(stats, resources);
    for (const auto& [output, sums] : {std::pair{args.grad_bias, results}, {args.grad_weight, results + channels}}) {
      if (error != cudaSuccess) return error;
      if (output)
        error = for_each_channel(WriteParameterGradient{sums, 2 * channels, output, args.samples, channels},
                                 (output.by_sample ? args.samples : 1) * channels, resources.stream);
    }
    return error;
  }
};

template <class T, int kValues, int kVectors>
cudaError_t start_rows(const LayerNormBackward& args, const ResidentRowsPlan& plan, Resources& resources) {
  const LaunchConfig config{dim3(extent(args.samples * plan.blocks), extent(plan.chunks)),
                            dim3(static_cast<unsigned>(plan.threads)), resources.stream};
  const ParameterSums<compute_t<T>> sums(args, plan.blocks, resources);
  const auto start = [&](RowPhase phase, double* chunk_sums) {
    return launch(config, layer_norm_backward_rows<T, kValues, kVectors>, args, plan, phase, chunk_sums, sums.data);
  };
  cudaError_t error = cudaSuccess;
  if (plan.chunks == 1) {
    error = start(RowPhase::kBoth, nullptr);
  } else {
    auto* const chunk_sums = static_cast<double*>(
        resources.scratch(args.view.outer * plan.chunks * 2 * static_cast<int64_t>(sizeof(double))));
    error = start(RowPhase::kSum, chunk_sums);
    if (error == cudaSuccess) error = start(RowPhase::kApply, chunk_sums);
  }
  return error != cudaSuccess ? error : sums.write(resources);
}

template <class T>
cudaError_t rows(const LayerNormBackward& args, bool aligned, Resources& resources) {
  const ResidentRowsPlan plan =
      plan_resident_rows(rows_of(args.view, args.samples, sizeof(T), aligned), true, resources.limits);
  return for_resident_vectors<values_per_access(sizeof(T)), sizeof(compute_t<T>), true>(
      plan, [&](auto values, auto vectors) { return start_rows<T, values(), vectors()>(args, plan, resources); });
}

template <class T>
cudaError_t columns(const LayerNormBackward& args, bool aligned, Resources& resources) {
  const LayerColumnsPlan plan = plan_layer_columns(args.view, args.samples, sizeof(T), aligned, resources.limits);
  const LaunchConfig config{dim3(extent(args.samples * plan.blocks)), dim3(kThreads), resources.stream};
  const ParameterSums<compute_t<T>> sums(args, plan.blocks, resources);
  const auto start = [&](auto kernel) { return launch(config, kernel, args, plan, sums.data); };
  const cudaError_t error = plan.values == 1 ? start(layer_norm_backward_columns<T, 1>)
                                             : start(layer_norm_backward_columns<T, layer_column_values(sizeof(T))>);
  return error != cudaSuccess ? error : sums.write(resources);
}

}  // namespace

cudaError_t layer_norm_backward(const LayerNormBackward& args, Resources& resources) {
  const bool aligned = all_aligned(args.input, args.grad_output, args.grad_input, args.grad_sum, args.weight.data);
  return for_floating(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return args.view.inner == 1 ? rows<T>(args, aligned, resources) : columns<T>(args, aligned, resources);
  });
}

}  // namespace normfused::cuda
