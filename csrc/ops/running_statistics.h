// Running statistics in training: argument checks, and the pointers through which kernels update them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/types.h"

namespace normfused::ops {

using OptionalTensor = std::optional<at::Tensor>;

// Throws if the tensor's elements overlap in memory; increments its version for autograd.
void begin_update(const at::Tensor& tensor);
// Copies `written` to `tensor`, unless they are the same tensor.
void finish_update(const at::Tensor& tensor, const at::Tensor& written);

void check_eps(double eps);

// A batch's contribution to the running statistics. The variance that updates running_var is M2 / (count - correction).
struct RunningStatistics {
  const OptionalTensor& mean;                 // (C), updated in place
  const OptionalTensor& var;                  // (C), updated in place
  const OptionalTensor& num_batches_tracked;  // (), int64, incremented
  // (C), int64: a channel whose statistics are not finite keeps its running statistics and is counted here.
  const OptionalTensor& nonfinite_batches;
  std::optional<double> momentum;  // none: cumulative average
  double eps;
  int64_t correction;
  bool update_in_backward;

  void check(int64_t channels, const at::Device& device) const;
  // False in a backward pass without update_in_backward: there checkpointing recomputes a forward that has already
  // updated the buffers.
  bool are_updated() const;
  // Fills in `args`. The pointers are null if the buffers are not updated, and valid until finish() otherwise. Throws
  // before anything is written if a buffer cannot be written.
  void begin(BatchStatistics& args);
  void finish();

  OptionalTensor dense_mean{}, dense_var{};
};

}  // namespace normfused::ops
