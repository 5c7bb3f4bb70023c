#include "kernels/cuda/standardize.cuh"

#include <algorithm>

#include "kernels/cuda/launch.cuh"

namespace normfused::cuda {

namespace {

template <class T, class Output>
cudaError_t run(const Standardize& args, Resources& resources) {
  constexpr int kValues = values_per_access(std::max(sizeof(T), sizeof(Output)));
  const bool vectors =
      args.channels <= kImageTileChannels && args.pixels % kValues == 0 && all_aligned(args.input, args.output);
  for (int64_t first = 0; first < args.channels; first += kLaunchChannels) {
    const int64_t last = std::min(first + kLaunchChannels, args.channels);
    const Tiles tiles = tiles_of(args, first, last);
    Constants<T> constants;
    for (int64_t c = first; c < last; ++c) prepare(normalization_of(args, c), constants.channel[c - first]);
    const LaunchConfig config{dim3(extent(tiles.blocks(args.images))), dim3(kThreads), resources.stream};
    const auto start = [&](auto kernel) {
      return launch(config, kernel, static_cast<const T*>(args.input), static_cast<Output*>(args.output), tiles,
                    constants);
    };
    const cudaError_t error =
        vectors ? start(standardize_tiles<T, Output, kValues>) : start(standardize_tiles<T, Output, 1>);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t standardize(const Standardize& args, Resources& resources) {
  if (args.dtype == args.output_dtype)
    return for_floating(args.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      return run<T, T>(args, resources);
    });
  const auto narrowing = [&](auto from) {
    using T = typename decltype(from)::type;
    switch (args.output_dtype) {
      case DType::kFloat16:
        return run<T, __half>(args, resources);
      case DType::kBFloat16:
        return run<T, __nv_bfloat16>(args, resources);
      default:
        return cudaErrorInvalidValue;
    }
  };
  if (args.dtype == DType::kFloat32) return narrowing(Type<float>{});
  if (args.dtype != DType::kUInt8) return cudaErrorInvalidValue;
  return args.output_dtype == DType::kFloat32 ? run<uint8_t, float>(args, resources) : narrowing(Type<uint8_t>{});
}

}  // namespace normfused::cuda
