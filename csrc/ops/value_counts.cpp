#include "ops/value_counts.h"

#include <ATen/Functions.h>

#include <limits>
#include <vector>

#include "kernels/cpu/value_counts.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace normfused::ops {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> value_counts(const Tensor& input) {
  check_dims(input);
  TORCH_CHECK_NOT_IMPLEMENTED(input.is_cpu(), "value_counts: expected a CPU tensor, got one on ", input.device());
  const bool is_half = input.element_size() == 2 && at::isFloatingType(input.scalar_type());
  const Tensor dense = as_dense(is_half ? input.to(at::kFloat) : input);
  const ChannelView view = *view_of(dense);
  TORCH_CHECK_VALUE(view.positions() <= std::numeric_limits<uint32_t>::max(), "value_counts: ", view.positions(),
                    " values per channel, at most 2^32 - 1 can be counted at once");
  const auto channels =
      cpu::value_counts({view, any_dtype_of(dense.scalar_type()), dense.const_data_ptr()}, kCpuParallel);
  int64_t total = 0;
  for (const auto& channel : channels) total += static_cast<int64_t>(channel.size());
  const Tensor values = at::empty({total}, at::kDouble), counts = at::empty({total}, at::kLong);
  const Tensor sizes = at::empty({input.size(1)}, at::kLong);
  double* value = values.mutable_data_ptr<double>();
  int64_t *count = counts.mutable_data_ptr<int64_t>(), *size = sizes.mutable_data_ptr<int64_t>();
  for (const auto& channel : channels) {
    *size++ = static_cast<int64_t>(channel.size());
    for (const cpu::ValueCount& entry : channel) *value++ = entry.value, *count++ = entry.count;
  }
  return {values, counts, sizes};
}

}  // namespace normfused::ops
