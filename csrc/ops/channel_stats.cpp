#include "ops/channel_stats.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <array>

#include "ops/backend.h"
#include "ops/find_operator.h"
#include "ops/layout.h"

namespace normfused::ops {

namespace {

using Kernel = void (*)(const ChannelStats&, const at::Device&);

template <size_t count>
std::array<at::Tensor, count> run(const at::Tensor& input, at::ScalarType type, Kernel kernel) {
  TORCH_CHECK_VALUE(input.dim() >= 2, "input needs at least 2 dimensions, got shape ", input.sizes());
  const DType dtype = any_dtype_of(input.scalar_type());
  const at::Tensor dense = as_dense(input);
  std::array<at::Tensor, count> results;
  for (at::Tensor& result : results)
    result = at::empty({input.size(1)}, input.options().dtype(type).memory_format(at::MemoryFormat::Contiguous));
  ChannelStats args{*view_of(dense), dtype, dense.const_data_ptr(), {}};
  for (size_t i = 0; i < count; ++i) args.results[i] = results[i].mutable_data_ptr();
  if (input.numel() > 0) kernel(args, input.device());
  return results;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_moments_kernels(const at::Tensor& input) {
  if (input.is_cpu()) dtype_of(input.scalar_type());  // which throws for integers
  auto [mean, m2, min, max] = run<4>(input, at::kDouble, backend_of(input).channel_moments);
  if (input.numel() == 0) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    return {mean.zero_(), m2.zero_(), min.fill_(kInfinity), max.fill_(-kInfinity)};
  }
  return {mean, m2, min, max};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_sums_kernels(const at::Tensor& input) {
  const bool floating = at::isFloatingType(input.scalar_type());
  auto [sum, squares, min, max] = run<4>(input, floating ? at::kDouble : at::kLong, backend_of(input).channel_sums);
  if (input.numel() == 0) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    sum.zero_(), squares.zero_();
    if (floating) return {sum, squares, min.fill_(kInfinity), max.fill_(-kInfinity)};
    using Limits = std::numeric_limits<int64_t>;
    return {sum, squares, min.fill_(Limits::max()), max.fill_(Limits::min())};
  }
  return {sum, squares, min, max};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_moments(const at::Tensor& input) {
  static const auto op = find_operator<decltype(channel_moments)>("normfused::channel_moments");
  return op.call(input);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_sums(const at::Tensor& input) {
  static const auto op = find_operator<decltype(channel_sums)>("normfused::channel_sums");
  return op.call(input);
}

TORCH_LIBRARY_IMPL(normfused, CPU, m) {
  m.impl("channel_moments", channel_moments_kernels);
  m.impl("channel_sums", channel_sums_kernels);
}

#if defined(NORMFUSED_WITH_CUDA)
TORCH_LIBRARY_IMPL(normfused, CUDA, m) {
  m.impl("channel_moments", channel_moments_kernels);
  m.impl("channel_sums", channel_sums_kernels);
}
#endif

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("channel_moments", torch::autograd::autogradNotImplementedFallback());
  m.impl("channel_sums", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace normfused::ops
