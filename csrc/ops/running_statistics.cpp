#include "ops/running_statistics.h"

#include <ATen/MemoryOverlap.h>
#include <torch/csrc/autograd/graph_task.h>

#include <cmath>
#include <limits>

#include "ops/layout.h"

namespace normfused::ops {

void begin_update(const at::Tensor& tensor) {
  at::assert_no_internal_overlap(tensor);
  tensor.unsafeGetTensorImpl()->bump_version();
}

void finish_update(const at::Tensor& tensor, const at::Tensor& written) {
  if (!written.is_same(tensor)) tensor.copy_(written);
}

void check_eps(double eps) {
  TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps must be a non-negative finite number, got ", eps);
}

void RunningStatistics::check(int64_t channels, const at::Device& device) const {
  TORCH_CHECK_VALUE(mean.has_value() == var.has_value(), "running_mean and running_var must be given together");
  TORCH_CHECK_VALUE(!mean || !mean->is_same(*var), "running_mean and running_var are the same tensor");
  for (const auto* const buffer : {&mean, &var})
    TORCH_CHECK_VALUE(!*buffer || ((*buffer)->dim() == 1 && (*buffer)->size(0) == channels &&
                                   (*buffer)->is_floating_point() && (*buffer)->device() == device),
                      "running statistics must be floating-point tensors of shape (", channels, ") on ", device);
  TORCH_CHECK_VALUE(
      !num_batches_tracked || (num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->dim() == 0 &&
                               num_batches_tracked->device() == device),
      "num_batches_tracked must be a 0-d int64 tensor on ", device);
  TORCH_CHECK_VALUE(!momentum || std::isfinite(*momentum), "momentum must be finite, got ", *momentum);
  TORCH_CHECK_VALUE(momentum || num_batches_tracked || !mean, "momentum=None needs num_batches_tracked");
  check_eps(eps);
  TORCH_CHECK_VALUE(correction == 0 || correction == 1, "correction must be 0 or 1, got ", correction);
  TORCH_CHECK_VALUE(!nonfinite_batches || (nonfinite_batches->scalar_type() == at::kLong &&
                                           nonfinite_batches->dim() == 1 && nonfinite_batches->size(0) == channels &&
                                           nonfinite_batches->is_contiguous() && nonfinite_batches->device() == device),
                    "nonfinite_batches must be a contiguous int64 tensor of shape (channels) on ", device);
}

bool RunningStatistics::are_updated() const {
  return update_in_backward || torch::autograd::get_current_graph_task_id() == -1;
}

void RunningStatistics::begin(BatchStatistics& args) {
  args.momentum = momentum.value_or(std::numeric_limits<double>::quiet_NaN());
  args.eps = eps;
  args.correction = correction;
  if (!are_updated()) return;
  for (const auto* const buffer : {&mean, &var, &num_batches_tracked, &nonfinite_batches})
    if (*buffer) begin_update(**buffer);
  if (mean) dense_mean = mean->contiguous();
  if (var) dense_var = var->contiguous();
  args.running_mean = channel_vector(dense_mean);
  args.running_var = channel_vector(dense_var);
  args.num_batches_tracked = num_batches_tracked ? num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr;
  args.nonfinite_batches = nonfinite_batches ? nonfinite_batches->mutable_data_ptr<int64_t>() : nullptr;
}

void RunningStatistics::finish() {
  if (dense_mean) finish_update(*mean, *dense_mean);
  if (dense_var) finish_update(*var, *dense_var);
}

}  // namespace normfused::ops
