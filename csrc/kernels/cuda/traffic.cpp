#include "kernels/cuda/traffic.h"

#include <algorithm>

namespace normfused::cuda {

Traffic traffic(Operation operation, const ChannelView& view, int itemsize, const DeviceLimits& limits,
                const Residency& resident) {
  const bool reduces = operation != Operation::kInference;
  const bool applies = operation != Operation::kMoments && operation != Operation::kSums;
  const bool backward = operation == Operation::kBackward || operation == Operation::kInferenceBackward;
  const bool may_apply = operation == Operation::kTraining || operation == Operation::kBackward;
  const int sums = applies ? 2 : 4;
  const int inputs = backward ? 2 : 1;
  const int applied_inputs = operation == Operation::kBackward ? 2 : 1;
  const int64_t bytes = view.numel() * itemsize;

  Traffic result{};
  if (reduces) {
    result.reduction = plan_reduction(view, itemsize, inputs, true, may_apply, limits, resident);
    result.single = result.reduction.single();
    const int64_t partials = result.reduction.splits() * sums * view.channels * int64_t{sizeof(double)};
    result.merged = std::max(std::min(result.reduction.group, result.reduction.splits()), result.reduction.groups());
    result.launches += 1;
    result.read += inputs * bytes + partials;
    result.written += partials;
  }
  if (applies) {
    result.apply = plan_apply(view, itemsize, itemsize, true, limits);
    // A single launch reads the tensor again from L1. Inference can need another launch that prepares coefficients.
    if (!result.single) {
      result.launches += reduces || result.apply.may_prepare() ? 1 : 2;
      result.read += applied_inputs * bytes;
    }
    result.written += bytes;
  }
  return result;
}

}  // namespace normfused::cuda
