#include "ops/batch_norm_composite.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <torch/library.h>

#include "ops/batch_norm_checks.h"
#include "ops/layout.h"
#include "ops/running_statistics.h"

namespace normfused::ops {

namespace {

using at::Tensor;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;

// A vector of channels in the dtype of `like`, of a shape that broadcasts with it.
Tensor per_channel(const Tensor& vector, const Tensor& like) {
  at::DimVector shape(like.dim(), 1);
  shape[1] = -1;
  return vector.to(like.scalar_type()).view(shape);
}

at::DimVector reduced_dims(const Tensor& input) {
  at::DimVector dims;
  for (int64_t dim = 0; dim < input.dim(); ++dim)
    if (dim != 1) dims.push_back(dim);
  return dims;
}

Tensor average(const Tensor& values) { return values.mean(reduced_dims(values), /*keepdim=*/true); }

// Mean and biased variance, whose shapes broadcast with `x`.
std::pair<Tensor, Tensor> moments(const Tensor& x) {
  const Tensor mean = average(x), deviation = x - mean;
  return {mean, average(deviation * deviation)};
}

struct Normalized {
  Tensor deviation;  // (x - mean) * invstd
  Tensor invstd;
};

// In training, mean and variance depend on the input. Their values are those of `statistics`, which has eps in it: the
// term that makes up the difference is detached, and adds nothing to any derivative. The mean is subtracted in double
// precision, so that the rest may be in the input's.
Normalized normalized(const Tensor& input, const Tensor& statistics, bool training) {
  const Tensor x = input.to(at::kDouble);
  const Tensor shifted = (x - per_channel(statistics[0], x)).to(at::toOpMathType(input.scalar_type()));
  const Tensor invstd = per_channel(statistics[1], shifted);
  if (!training) return {shifted * invstd, invstd};
  const auto [mean, var] = moments(shifted);
  const Tensor tied = (var + (invstd.pow(-2) - var).detach()).rsqrt();
  return {(shifted - mean) * tied, tied};
}

// What the activation is applied to.
Tensor affine(const Tensor& deviation, const OptionalTensor& weight, const OptionalTensor& bias,
              const OptionalTensor& residual) {
  Tensor z = deviation;
  if (weight) z = z * per_channel(*weight, z);
  if (bias) z = z + per_channel(*bias, z);
  if (residual) z = z + residual->to(z.scalar_type());
  return z;
}

// The bits of a mask as a tensor of bools like `like`, which is laid out in memory as the values were.
Tensor unpacked(const Tensor& mask, const Tensor& like) {
  const Tensor places = at::arange(8, mask.options());
  const Tensor bits = at::bitwise_and(at::bitwise_right_shift(mask.unsqueeze(1), places), 1).view(-1).to(at::kBool);
  return bits.slice(0, 0, like.numel()).as_strided(like.sizes(), like.strides());
}

// The innermost vmap that batches this tensor.
int64_t vmap_level(const Tensor& tensor) {
  const auto* const batched = at::functorch::maybeGetBatchedImpl(tensor);
  return batched ? batched->level() : -1;
}

// One update for each sample of vmap needs one buffer for each.
void check_can_be_updated(const Tensor& input, const OptionalTensor& buffer) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !buffer || vmap_level(input) <= vmap_level(*buffer),
      "batch_norm: vmap over the input cannot update running statistics that vmap does not batch too. Construct the "
      "layer with track_running_stats=False, call torch.func.replace_all_batch_norm_modules_, call "
      "functional.batch_norm without running statistics, or use eval mode");
}

// The running statistics of each sample, as RunningStatistics keeps those of one.
void update_batched(const Tensor& mean, const Tensor& var, int64_t count, const OptionalTensor& running_mean,
                    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                    std::optional<double> momentum, int64_t correction, const OptionalTensor& nonfinite_batches) {
  const at::NoGradGuard no_grad;
  const Tensor new_mean = mean.detach().view(-1);
  const Tensor new_var = var.detach().view(-1) * (static_cast<double>(count) / static_cast<double>(count - correction));
  const Tensor finite = at::isfinite(new_mean).logical_and(at::isfinite(new_var));
  Tensor share = at::scalar_tensor(momentum.value_or(0), new_mean.options());
  if (!momentum && num_batches_tracked) share = (num_batches_tracked->to(at::kDouble) + 1).reciprocal();
  const auto update = [&](const OptionalTensor& running, const Tensor& value) {
    if (!running) return;
    const Tensor before = running->to(at::kDouble), after = before * (1 - share) + value * share;
    running->copy_(nonfinite_batches ? at::where(finite, after, before) : after);
  };
  update(running_mean, new_mean);
  update(running_var, new_var);
  if (num_batches_tracked) num_batches_tracked->add_(1);
  if (nonfinite_batches) nonfinite_batches->add_(finite.logical_not());
}

void check_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   const OptionalTensor& residual, bool save_mask) {
  check_input(input);
  check_channels("weight", weight, input);
  check_channels("bias", bias, input);
  check_channels("running_mean", running_mean, input);
  check_channels("running_var", running_var, input);
  check_like_input("residual", residual, input);
  TORCH_CHECK_NOT_IMPLEMENTED(!save_mask, "save_mask has no batching rule");
}

Outputs batch_norm_training_batched(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                    const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                                    double eps, const OptionalTensor& residual, std::string_view activation,
                                    double activation_param, bool save_mask, int64_t correction,
                                    const OptionalTensor& nonfinite_batches, bool update_in_backward) {
  const Activation applied = activation_of(activation, activation_param);
  check_forward(input, weight, bias, running_mean, running_var, residual, save_mask);
  const RunningStatistics running{running_mean, running_var, num_batches_tracked, nonfinite_batches,
                                  momentum,     eps,         correction,          update_in_backward};
  running.check(input.size(1), input.device());
  for (const auto* const buffer : {&running_mean, &running_var, &nonfinite_batches})
    check_can_be_updated(input, *buffer);
  const int64_t channels = input.size(1), count = channels == 0 ? 0 : input.numel() / channels;
  TORCH_CHECK_VALUE(count != 1, "expected more than 1 value per channel when training, got ", input.sizes());
  const auto [mean, var] = moments(input.to(at::kDouble));
  if (count != 0 && running.are_updated())
    update_batched(mean, var, count, running_mean, running_var, num_batches_tracked, momentum, correction,
                   nonfinite_batches);
  const Tensor statistics = at::stack({mean.view(-1), (var + eps).rsqrt().view(-1)}).detach();
  return {batch_norm_composite(input, weight, bias, residual, statistics, true, applied), statistics,
          at::empty({0}, input.options().dtype(at::kByte))};
}

Outputs batch_norm_inference_batched(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                     const Tensor& running_mean, const Tensor& running_var, double eps,
                                     const OptionalTensor& residual, std::string_view activation,
                                     double activation_param, bool save_mask) {
  const Activation applied = activation_of(activation, activation_param);
  check_forward(input, weight, bias, running_mean, running_var, residual, save_mask);
  const Tensor statistics =
      at::stack({running_mean.to(at::kDouble), (running_var.to(at::kDouble) + eps).rsqrt()}).detach();
  return {batch_norm_composite(input, weight, bias, residual, statistics, false, applied), statistics,
          at::empty({0}, input.options().dtype(at::kByte))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_batched(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& statistics,
    bool training, std::array<bool, 4> output_mask, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& mask, std::string_view activation, double activation_param, bool from_output,
    const OptionalTensor& sums, const OptionalTensor& count) {
  check_backward(grad_output, input, weight, statistics, training, output_mask, bias, residual, mask, activation,
                 activation_param, from_output, sums, count);
  TORCH_CHECK_NOT_IMPLEMENTED(!from_output && !sums, "backward from the output or from sums has no batching rule");
  return batch_norm_backward_composite(grad_output, input, weight, statistics, training, output_mask, bias, residual,
                                       mask, activation_of(activation, activation_param));
}

}  // namespace

Tensor batch_norm_composite(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, const Tensor& statistics, bool training,
                            const Activation& activation) {
  const Tensor deviation = normalized(input, statistics, training).deviation;
  return activate(activation, affine(deviation, weight, bias, residual)).to(input.scalar_type());
}

// With d = (x - mean) * invstd, z what the activation is applied to, and h = grad_output * activation'(z):
//   grad_bias = sum(h), grad_weight = sum(h * d), grad_residual = h, grad_input = weight * invstd * P(h),
// where P(h) = h - avg(h) - d * avg(h * d) in training, and P(h) = h where the statistics are constants.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_composite(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const Tensor& statistics,
    bool training, std::array<bool, 4> output_mask, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& mask, const Activation& activation) {
  const auto [d, invstd] = normalized(input, statistics, training);
  Tensor h = grad_output.to(d.scalar_type());
  if (mask) {
    const double below = activation.kind == ActivationKind::kLeakyRelu ? activation.parameter : 0;
    h = at::where(unpacked(*mask, as_dense(input)), h, h * below);
  } else {
    h = activate_backward(activation, h, affine(d, weight, bias, residual));
  }

  const at::ScalarType type = input.scalar_type();
  const at::ScalarType parameter_type = weight ? weight->scalar_type() : at::toOpMathType(type);
  const auto sum = [&](const Tensor& values) { return values.sum(reduced_dims(values)).to(parameter_type); };
  const Tensor none = at::empty({0}, input.options()), no_parameter = none.to(parameter_type);
  Tensor grad_input = none;
  if (output_mask[0]) {
    const Tensor projected = training ? h - average(h) - d * average(h * d) : h;
    grad_input = (weight ? projected * (per_channel(*weight, d) * invstd) : projected * invstd).to(type);
  }
  return {grad_input, output_mask[1] ? sum(h * d) : no_parameter, output_mask[2] ? sum(h) : no_parameter,
          output_mask[3] ? h.to(type) : none};
}

TORCH_LIBRARY_IMPL(normfused, FuncTorchBatched, m) {
  m.impl("batch_norm_training", batch_norm_training_batched);
  m.impl("batch_norm_inference", batch_norm_inference_batched);
  m.impl("batch_norm_backward", batch_norm_backward_batched);
}

}  // namespace normfused::ops
