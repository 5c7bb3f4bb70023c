#include "ops/channel_stats.h"

#include <ATen/Functions.h>

#include <array>
#include <limits>

#include "ops/backend.h"
#include "ops/layout.h"
#include "ops/registration.h"

namespace normfused::ops {

namespace {

using at::Tensor;
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Kernel = void (*)(const ChannelStats&, const at::Device&);

// The four results, of dtype `type`. Those of empty channels are 0, 0 and the neutral elements of minimum and maximum.
Result run(const Tensor& input, at::ScalarType type, Kernel kernel) {
  check_dims(input);
  const DType dtype = any_dtype_of(input.scalar_type());
  const Tensor dense = as_dense(input);
  ChannelStats args{*view_of(dense), dtype, dense.const_data_ptr(), {}};
  std::array<Tensor, 4> results;
  for (size_t i = 0; i < results.size(); ++i) {
    results[i] = at::empty({input.size(1)}, input.options().dtype(type).memory_format(at::MemoryFormat::Contiguous));
    args.results[i] = results[i].mutable_data_ptr();
  }
  const auto& [first, second, min, max] = results;
  if (input.numel() > 0) {
    kernel(args, input.device());
  } else if (type == at::kDouble) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    first.zero_(), second.zero_(), min.fill_(kInfinity), max.fill_(-kInfinity);
  } else {
    using Limits = std::numeric_limits<int64_t>;
    first.zero_(), second.zero_(), min.fill_(Limits::max()), max.fill_(Limits::min());
  }
  return {first, second, min, max};
}

Result channel_moments_kernels(const Tensor& input) {
  if (input.is_cpu()) dtype_of(input.scalar_type());  // throws for integers, which only CUDA has kernels for
  return run(input, at::kDouble, backend_of(input).channel_moments);
}

Result channel_sums_kernels(const Tensor& input) {
  const at::ScalarType type = at::isFloatingType(input.scalar_type()) ? at::kDouble : at::kLong;
  return run(input, type, backend_of(input).channel_sums);
}

}  // namespace

Result channel_moments(const Tensor& input) {
  static const auto op = find_operator<decltype(channel_moments)>("normfused::channel_moments");
  return op.call(input);
}

Result channel_sums(const Tensor& input) {
  static const auto op = find_operator<decltype(channel_sums)>("normfused::channel_sums");
  return op.call(input);
}

TORCH_LIBRARY_FRAGMENT(normfused, m) {
  m.def("channel_moments(Tensor input) -> (Tensor mean, Tensor m2, Tensor min, Tensor max)");
  m.def("channel_sums(Tensor input) -> (Tensor sum, Tensor sum_of_squares, Tensor min, Tensor max)");
}

NF_LIBRARY_IMPL_BACKENDS(m) {
  m.impl("channel_moments", channel_moments_kernels);
  m.impl("channel_sums", channel_sums_kernels);
}

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("channel_moments", not_differentiable());
  m.impl("channel_sums", not_differentiable());
}

}  // namespace normfused::ops
