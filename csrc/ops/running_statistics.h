// Running statistics in training: what they must be, and how kernels come to write them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/types.h"

namespace normfused::ops {

// Refuses a tensor that cannot be written; tells autograd that it changes.
void begin_update(const at::Tensor& tensor);
// Brings the values home where they were written to a contiguous copy.
void finish_update(const at::Tensor& tensor, const at::Tensor& written);

struct RunningStatistics {
  const std::optional<at::Tensor>&mean, &var, &num_batches_tracked, &nonfinite_batches;
  std::optional<double> momentum;  // none: cumulative averages
  double eps;
  int64_t correction;
  bool update_in_backward;

  void check(int64_t channels, const at::Device& device) const;
  // Not inside a backward pass without update_in_backward: there a forward recomputes what has already updated them.
  bool are_updated() const;
  // All buffers are refused before one is written. The arguments point to memory that is kept until finish(), or to
  // none where the buffers are not updated.
  void begin(BatchStatistics& args);
  void finish();

  std::optional<at::Tensor> dense_mean{}, dense_var{};
};

}  // namespace normfused::ops
