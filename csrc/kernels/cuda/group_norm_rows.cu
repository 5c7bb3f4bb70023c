#include "kernels/cuda/group_norm_rows.cuh"

#include "kernels/cuda/group_norm_single.h"
#include "kernels/cuda/launch.cuh"

namespace normfused::cuda {

namespace {

template <class T, bool kFused>
cudaError_t rows(const GroupNormForward& args, Resources& resources, bool& supported) {
  using Op = GroupRowsOp<T, kFused>;
  constexpr int kValues = values_per_access(planned_itemsize<typename Op::Normalize>());
  const bool aligned = all_aligned(args.input, args.output, args.residual);
  const ResidentRowsPlan plan =
      plan_resident_rows(rows_of(args.view, sizeof(T), kValues, aligned), false, resources.limits);
  supported = is_resident(plan, args.view, args.mask != nullptr);
  if (!supported) return cudaSuccess;
  Op op{args, {}};
  op.normalize = {static_cast<const T*>(args.input),
                  static_cast<T*>(args.output),
                  nullptr,
                  nullptr,
                  static_cast<const T*>(args.residual),
                  args.activation,
                  args.mask};
  if (args.mask != nullptr) op.normalize.mask_padding = args.mask + mask_bytes(args.view.numel()) - kMaskPadding;
  const cudaError_t error = normalize_resident<kValues>(op, plan, resources);
  supported = error != kNoCluster;
  return supported ? error : cudaSuccess;
}

}  // namespace

cudaError_t group_norm_rows(const GroupNormForward& args, Resources& resources, bool& supported) {
  return for_floating(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return args.fused() ? rows<T, true>(args, resources, supported) : rows<T, false>(args, resources, supported);
  });
}

}  // namespace normfused::cuda
