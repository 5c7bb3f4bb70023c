#include "ops/batch_norm_composite.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <torch/library.h>

#include "ops/batch_norm_checks.h"
#include "ops/call.h"
#include "ops/layout.h"

namespace normfused::ops {

namespace {

using at::Tensor;

at::DimVector reduced_dims(const Tensor& input) {
  at::DimVector dims;
  for (int64_t dim = 0; dim < input.dim(); ++dim)
    if (dim != 1) dims.push_back(dim);
  return dims;
}

Tensor average(const Tensor& values) { return values.mean(reduced_dims(values), /*keepdim=*/true); }

// Mean and biased variance, in shapes that broadcast with `x`.
std::pair<Tensor, Tensor> moments(const Tensor& x) {
  const Tensor mean = average(x), deviation = x - mean;
  return {mean, average(deviation * deviation)};
}

struct Normalized {
  Tensor deviation;  // (x - mean) * invstd
  Tensor invstd;
};

// In training, mean and variance are functions of the input, with the values that `statistics` holds. `statistics`
// includes eps: the difference to `var` is detached and does not change any derivative. The mean is subtracted in
// double precision; after that the input's precision is enough.
Normalized normalized(const Tensor& input, const Tensor& statistics, bool training) {
  const Tensor x = input.to(at::kDouble);
  const Tensor shifted = (x - per_channel(statistics[0], x)).to(at::toOpMathType(input.scalar_type()));
  const Tensor invstd = per_channel(statistics[1], shifted);
  if (!training) return {shifted * invstd, invstd};
  const auto [mean, var] = moments(shifted);
  const Tensor rstd = (var + (invstd.pow(-2) - var).detach()).rsqrt();
  return {(shifted - mean) * rstd, rstd};
}

// The argument of the activation.
Tensor affine(const Tensor& deviation, const OptionalTensor& weight, const OptionalTensor& bias,
              const OptionalTensor& residual) {
  Tensor z = deviation;
  if (weight) z = z * per_channel(*weight, z);
  if (bias) z = z + per_channel(*bias, z);
  if (residual) z = z + residual->to(z.scalar_type());
  return z;
}

// The level of the innermost vmap that batches this tensor; -1 if none does.
int64_t vmap_level(const Tensor& tensor) {
  const auto* const batched = at::functorch::maybeGetBatchedImpl(tensor);
  return batched ? batched->level() : -1;
}

// vmap over the input needs one buffer per sample.
void check_can_be_updated(const Tensor& input, const OptionalTensor& buffer) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !buffer || vmap_level(input) <= vmap_level(*buffer),
      "batch_norm: vmap over the input cannot update running statistics that are not batched by the same vmap. "
      "Construct the layer with track_running_stats=False, call torch.func.replace_all_batch_norm_modules_, call "
      "functional.batch_norm without running statistics, or use eval mode");
}

// finish() of kernels/math.h in ATen operators, for each sample of vmap.
void update_batched(const Tensor& mean, const Tensor& var, int64_t count, const RunningStatistics& running) {
  const at::NoGradGuard no_grad;
  const Tensor new_mean = mean.detach().view(-1);
  const Tensor new_var =
      var.detach().view(-1) * static_cast<double>(count) / static_cast<double>(count - running.correction);
  const Tensor finite = at::isfinite(new_mean).logical_and(at::isfinite(new_var));
  Tensor factor = at::scalar_tensor(running.momentum.value_or(0), new_mean.options());
  if (!running.momentum && running.num_batches_tracked)
    factor = (running.num_batches_tracked->to(at::kDouble) + 1).reciprocal();
  const auto update = [&](const OptionalTensor& buffer, const Tensor& value) {
    if (!buffer) return;
    const Tensor before = buffer->to(at::kDouble), after = (1 - factor) * before + factor * value;
    buffer->copy_(running.nonfinite_batches ? at::where(finite, after, before) : after);
  };
  update(running.mean, new_mean);
  update(running.var, new_var);
  if (running.num_batches_tracked) running.num_batches_tracked->add_(1);
  if (running.nonfinite_batches) running.nonfinite_batches->add_(finite.logical_not());
}

void check_batched(const BatchNormOptions& options, const OptionalTensor& running_mean,
                   const OptionalTensor& running_var) {
  check_operands(options, running_mean, running_var);
  check_like_input("residual", options.residual, options.input);
  TORCH_CHECK_NOT_IMPLEMENTED(!options.save_mask, "save_mask has no batching rule");
}

BatchNormTrainingCall::Result normalized_batch(const BatchNormOptions& options, const Tensor& statistics, bool training,
                                               const Activation& activation) {
  const Tensor& input = options.input;
  return {batch_norm_composite(input, options.weight, options.bias, options.residual, statistics, training, activation),
          statistics, at::empty({0}, input.options().dtype(at::kByte))};
}

BatchNormTrainingCall::Result training_batched(const BatchNormTrainingCall& call) {
  const Activation activation = activation_of(call.activation, call.activation_param);
  const Tensor& input = call.input;
  const RunningStatistics running = call.running();
  check_batched(call.options(), running.mean, running.var);
  running.check(input.size(1), input.device());
  for (const auto* const buffer : {&running.mean, &running.var, &running.nonfinite_batches})
    check_can_be_updated(input, *buffer);
  const int64_t channels = input.size(1), count = channels == 0 ? 0 : input.numel() / channels;
  check_training_count(count, input);
  const auto [mean, var] = moments(input.to(at::kDouble));
  if (count != 0 && running.are_updated()) update_batched(mean, var, count, running);
  const Tensor statistics = at::stack({mean.view(-1), (var + call.eps).rsqrt().view(-1)}).detach();
  return normalized_batch(call.options(), statistics, true, activation);
}

BatchNormInferenceCall::Result inference_batched(const BatchNormInferenceCall& call) {
  const Activation activation = activation_of(call.activation, call.activation_param);
  check_batched(call.options(), call.running_mean, call.running_var);
  const Tensor mean = call.running_mean.to(at::kDouble), var = call.running_var.to(at::kDouble);
  const Tensor statistics = at::stack({mean, (var + call.eps).rsqrt()}).detach();
  return normalized_batch(call.options(), statistics, false, activation);
}

BatchNormBackwardCall::Result backward_batched(const BatchNormBackwardCall& call) {
  check_backward(call);
  TORCH_CHECK_NOT_IMPLEMENTED(!call.from_output && !call.sums,
                              "backward from the output or from sums has no batching rule");
  return batch_norm_backward_composite(call);
}

}  // namespace

Tensor per_channel(const Tensor& vector, const Tensor& like) {
  at::DimVector shape(like.dim(), 1);
  shape[1] = -1;
  return vector.to(like.scalar_type()).view(shape);
}

Tensor unpacked_mask(const Tensor& mask, const Tensor& like) {
  const Tensor shifts = at::arange(8, mask.options());
  const Tensor bits = at::bitwise_and(at::bitwise_right_shift(mask.unsqueeze(1), shifts), 1).view(-1).to(at::kBool);
  return bits.slice(0, 0, like.numel()).as_strided(like.sizes(), like.strides());
}

Tensor batch_norm_composite(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, const Tensor& statistics, bool training,
                            const Activation& activation) {
  const Tensor deviation = normalized(input, statistics, training).deviation;
  return activate(activation, affine(deviation, weight, bias, residual)).to(input.scalar_type());
}

// With d = (x - mean) * invstd, z the argument of the activation, and h = grad_output * activation'(z):
//   grad_bias = sum(h), grad_weight = sum(h * d), grad_residual = h, grad_input = weight * invstd * P(h),
// where P(h) = h - avg(h) - d * avg(h * d) in training, and P(h) = h if the statistics are constants.
BatchNormBackwardCall::Result batch_norm_backward_composite(const BatchNormBackwardCall& call) {
  const Tensor& input = call.input;
  const OptionalTensor& weight = call.weight;
  const auto& requested = call.output_mask;
  const Activation activation = activation_of(call.activation, call.activation_param);
  const auto [d, invstd] = normalized(input, call.statistics, call.training);
  Tensor h = call.grad_output.to(d.scalar_type());
  if (call.mask) {
    const double slope = activation.kind == ActivationKind::kLeakyRelu ? activation.parameter : 0;
    h = at::where(unpacked_mask(*call.mask, as_dense(input)), h, h * slope);
  } else {
    h = activate_backward(activation, h, affine(d, weight, call.bias, call.residual));
  }

  const at::ScalarType type = input.scalar_type();
  const at::ScalarType parameter_type = weight ? weight->scalar_type() : at::toOpMathType(type);
  const auto sum = [&](const Tensor& values) { return values.sum(reduced_dims(values)).to(parameter_type); };
  const Tensor none = at::empty({0}, input.options()), no_parameter = none.to(parameter_type);
  Tensor grad_input = none;
  if (requested[0]) {
    const Tensor projected = call.training ? h - average(h) - d * average(h * d) : h;
    grad_input = (weight ? projected * (per_channel(*weight, d) * invstd) : projected * invstd).to(type);
  }
  return {grad_input, requested[1] ? sum(h * d) : no_parameter, requested[2] ? sum(h) : no_parameter,
          requested[3] ? h.to(type) : none};
}

TORCH_LIBRARY_IMPL(normfused, FuncTorchBatched, m) {
  m.impl("batch_norm_training", call_object<training_batched>());
  m.impl("batch_norm_inference", call_object<inference_batched>());
  m.impl("batch_norm_backward", call_object<backward_batched>());
}

}  // namespace normfused::ops
