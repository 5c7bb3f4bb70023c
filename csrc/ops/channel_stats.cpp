#include "ops/channel_stats.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <array>
#include <limits>

#include "ops/backend.h"
#include "ops/layout.h"
#include "ops/output_memory.h"
#include "ops/registration.h"

namespace normfused::ops {

namespace {

using at::Tensor;
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Kernel = void (*)(const ChannelStats&, const at::Device&);

at::TensorOptions options_of(const Tensor& input, at::ScalarType type) {
  return input.options().dtype(type).memory_format(at::MemoryFormat::Contiguous);
}

// The four results in float64. Those of empty channels are 0, 0 and the neutral elements of minimum and maximum.
Result run(const Tensor& input, Kernel kernel) {
  check_floating(input);
  const Tensor dense = as_dense(input);
  ChannelStats args{*view_of(dense), dtype_of(input.scalar_type()), dense.const_data_ptr(), {}};
  std::array<Tensor, 4> results;
  for (size_t i = 0; i < results.size(); ++i) {
    results[i] = empty_output({input.size(1)}, options_of(input, at::kDouble));
    args.results[i] = results[i].mutable_data_ptr<double>();
  }
  const auto& [first, second, min, max] = results;
  if (input.numel() > 0) {
    kernel(args, input.device());
  } else {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    first.zero_(), second.zero_(), min.fill_(kInfinity), max.fill_(-kInfinity);
  }
  return {first, second, min, max};
}

Result channel_moments_kernels(const Tensor& input) { return run(input, backend_of(input).channel_moments); }

Tensor integer_sums_kernels(const Tensor& input) {
  check_dims(input);
  const DType dtype = any_dtype_of(input.scalar_type());
  TORCH_CHECK_TYPE(is_integer(dtype), "expected integers, got ", input.scalar_type());
  const Tensor rows = at::zeros({IntegerSums::kRows, input.size(1)}, options_of(input, at::kLong));
  if (input.numel() == 0) {
    using Limits = std::numeric_limits<int64_t>;
    rows[IntegerSums::kMin].fill_(Limits::max()), rows[IntegerSums::kMax].fill_(Limits::min());
    return rows;
  }
  const Tensor dense = as_dense(input);
  const ChannelView view = *view_of(dense);
  TORCH_CHECK_VALUE(view.positions() <= IntegerSums::max_count(dtype), "channel_sums: the sums of ", view.positions(),
                    " values per channel of ", input.scalar_type(), " can overflow: at most ",
                    IntegerSums::max_count(dtype), " can be summed at once");
  backend_of(input).integer_sums({view, dtype, dense.const_data_ptr(), rows.mutable_data_ptr<int64_t>()},
                                 input.device());
  return rows;
}

// The sums whose parts are the rows [first, first + parts). Throws if one does not fit int64.
Tensor joined(const Tensor& rows, int64_t first, int64_t parts, const char* what) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  const Tensor digit = rows[first].bitwise_and(0xffffffff);
  const Tensor high = rows[first + 1] + rows[first].bitwise_right_shift(32);
  Tensor fits = (high >= -kLimit).logical_and(high < kLimit);
  for (int64_t k = 2; k < parts; ++k) fits = fits.logical_and(rows[first + k] == 0);
  TORCH_CHECK_VALUE(fits.all().item<bool>(), "channel_sums: the ", what,
                    " of a channel exceeds int64; normfused.ChannelStats has no limit");
  return digit + high * (2 * kLimit);
}

Result channel_sums_kernels(const Tensor& input) {
  if (at::isFloatingType(input.scalar_type())) return run(input, backend_of(input).channel_sums);
  const Tensor rows = integer_sums_kernels(input);
  const bool is_wide = input.element_size() > 2;
  const auto row = [&](int64_t k) { return rows[k].clone(); };
  return {is_wide ? joined(rows, IntegerSums::kSum, 2, "sum") : row(IntegerSums::kSum),
          is_wide ? joined(rows, IntegerSums::kSquares, 4, "sum of squares") : row(IntegerSums::kSquares),
          row(IntegerSums::kMin), row(IntegerSums::kMax)};
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

Tensor integer_sums(const Tensor& input) {
  static const auto op = find_operator<decltype(integer_sums)>("normfused::integer_sums");
  return op.call(input);
}

TORCH_LIBRARY_FRAGMENT(normfused, m) {
  m.def("channel_moments(Tensor input) -> (Tensor mean, Tensor m2, Tensor min, Tensor max)");
  m.def("channel_sums(Tensor input) -> (Tensor sum, Tensor sum_of_squares, Tensor min, Tensor max)");
  m.def("integer_sums(Tensor input) -> Tensor rows");
}

NF_LIBRARY_IMPL_BACKENDS(m) {
  m.impl("channel_moments", channel_moments_kernels);
  m.impl("channel_sums", channel_sums_kernels);
  m.impl("integer_sums", integer_sums_kernels);
}

TORCH_LIBRARY_IMPL(normfused, Autograd, m) {
  m.impl("channel_moments", not_differentiable());
  m.impl("channel_sums", not_differentiable());
  m.impl("integer_sums", not_differentiable());
}

}  // namespace normfused::ops
