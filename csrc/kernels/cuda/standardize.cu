#include "kernels/cuda/batch_norm.cuh"
#include "kernels/cuda/launch.cuh"

namespace normfused::cuda {

namespace {

template <class T, class Output>
cudaError_t run(const Standardize& args, Resources& resources) {
  using Normalize = NormalizeOp<T, Output>;
  using S = typename Normalize::S;
  S* const table = table_for<Normalize>(args.view, resources);
  const Normalize normalize{
      static_cast<const T*>(args.input), static_cast<Output*>(args.output), table, nullptr, nullptr, {}, nullptr};
  const cudaError_t error = for_each_channel(PrepareStandardize<S>{args.mean, args.std, args.view.channels, table},
                                             args.view.channels, resources.stream);
  if (error != cudaSuccess) return error;
  const bool aligned = all_aligned(args.input, args.output);
  return apply(normalize,
               plan_apply(args.view, planned_itemsize<Normalize>(), sizeof(Output), aligned, resources.limits),
               resources.stream);
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
