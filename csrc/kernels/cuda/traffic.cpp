#include "kernels/cuda/traffic.h"

#include <algorithm>

#include "kernels/math.h"

namespace normfused::cuda {

Traffic traffic(Operation operation, const ChannelView& view, int itemsize, bool fused, const DeviceLimits& limits,
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
    const Reduced split{itemsize, inputs, true};
    Reduced applied{itemsize, inputs, true, true};
    if (fused && operation == Operation::kTraining) applied.values = kMaxValues;
    if (may_apply && declares_states(applied.values, itemsize))
      result.reduction = plan_reduction(view, applied, limits, resident);
    if (!result.reduction.one_launch()) result.reduction = plan_reduction(view, split, limits, resident);
    result.single = result.reduction.single();
    result.pipelined = result.reduction.pipelined();
    result.persistent = result.reduction.persistent();
    const int64_t partials = result.reduction.splits() * sums * view.channels * int64_t{sizeof(double)};
    result.merged = std::max(std::min(result.reduction.group, result.reduction.splits()), result.reduction.groups());
    result.launches += 1;
    result.read += inputs * bytes + partials;
    result.written += partials;
  }
  if (applies) {
    result.apply = plan_apply(view, itemsize, itemsize, true, limits);
    // A single or pipelined launch keeps what it applies in shared memory or in the L2 cache. Inference can need
    // another launch that prepares coefficients.
    if (!result.reduction.one_launch()) {
      result.launches += reduces || result.apply.may_prepare() ? 1 : 2;
      result.read += applied_inputs * bytes;
    }
    if (result.persistent) {
      const ColumnsPlan& plan = result.reduction.columns;
      const int64_t split = plan.chunk * plan.width * plan.values * itemsize;
      result.kept = inputs * std::min(plan.blocks * split, bytes);
      result.read += inputs * bytes - result.kept;
    }
    result.written += bytes;
  }
  return result;
}

SampleTraffic group_norm_traffic(const GroupView& view, int itemsize, bool is_backward, const DeviceLimits& limits) {
  const ChannelView reduced = is_backward ? view.by_sample() : view.reduced();
  const int inputs = is_backward ? 2 : 1, sums = is_backward ? 2 : 4;
  const int64_t bytes = view.numel() * itemsize;
  SampleTraffic result{};
  result.rows = plan_resident_rows(rows_of(view, itemsize, values_per_access(itemsize), true), false, limits);
  if (!is_backward && is_resident(result.rows, view, false)) {
    const int64_t chunks = result.rows.chunks;
    const int64_t partials = chunks == 1 ? 0 : chunks * view.statistics() * int64_t{sizeof(Moments)};
    result.launches = 1;
    result.read = bytes + partials * chunks;  // each block of a cluster reads those of all its blocks
    result.written = bytes + partials;
    return result;
  }
  Reduced together{itemsize, inputs, true, is_backward || view.channels_last};
  together.together = view.width();
  if (together.may_apply) result.reduction = plan_reduction(reduced, together, limits);
  const bool single = together.may_apply && result.reduction.single();
  if (!single) result.reduction = plan_reduction(reduced, {itemsize, inputs, true}, limits);
  // Forward: reduction, finish, application. Backward also prepares the reduction and writes two parameter gradients.
  result.launches = single ? (is_backward ? 3 : 1) : (is_backward ? 6 : 3);
  const int64_t partials =
      result.reduction.splits() * (single ? 2 : sums) * reduced.statistics() * int64_t{sizeof(double)};
  result.read = (single ? 1 : 2) * inputs * bytes + partials;
  result.written = bytes + partials;
  return result;
}

SampleTraffic layer_norm_traffic(const ChannelView& view, int itemsize, bool is_backward, const DeviceLimits& limits) {
  const bool is_rows = view.inner == 1;
  const ResidentRowsPlan rows =
      is_rows ? plan_resident_rows(rows_of(view, 1, itemsize, true, !is_backward), is_backward, limits)
              : ResidentRowsPlan{};
  const LayerColumnsPlan columns = is_rows ? LayerColumnsPlan{} : plan_layer_columns(view, 1, itemsize, true, limits);
  const int passes = is_rows && rows.chunks > 1 && !rows.is_staged ? 2 : 1;
  const int64_t bytes = view.numel() * itemsize;
  if (!is_backward) return {passes, passes * bytes, bytes, {}, rows};
  // The sums of every block, for the gradients of weight and bias, which three launches add up and write.
  const int64_t sums = (is_rows ? rows.blocks : columns.blocks) * 2 * view.channels * std::max(itemsize, 4);
  return {passes + 3, passes * 2 * bytes + sums, bytes + sums, {}, rows};
}

}  // namespace normfused::cuda
