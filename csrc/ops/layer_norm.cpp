#include "ops/layer_norm.h"

#include <ATen/Functions.h>

#include "ops/backend.h"
#include "ops/batch_norm_checks.h"
#include "ops/call.h"
#include "ops/layout.h"
#include "ops/output_memory.h"
#include "ops/registration.h"

namespace normfused::ops {

namespace {

using at::Tensor;

// The dimensions that a statistic is over, and the memory layouts that kernels read.
struct LayerDims {
  int64_t start, end;  // inclusive

  void check(const Tensor& input) const {
    TORCH_CHECK_VALUE(0 <= start && start <= end && end < input.dim(), "start_dim and end_dim must be dimensions of ",
                      "input, got ", start, " and ", end, " for shape ", input.sizes());
  }
  at::IntArrayRef shape(const Tensor& input) const {
    return input.sizes().slice(static_cast<size_t>(start), static_cast<size_t>(end - start + 1));
  }
  at::DimVector statistics_shape(const Tensor& input) const {
    at::DimVector shape(input.sizes().begin(), input.sizes().end());
    std::fill(shape.begin() + start, shape.begin() + end + 1, 1);
    shape.insert(shape.begin(), 2);
    return shape;
  }
  // Channels last too, if the statistics are over channels.
  Tensor dense(const Tensor& input) const { return start == 1 && end == 1 ? as_dense(input) : as_contiguous(input); }
  ChannelView view(const Tensor& dense) const {
    const int64_t channels = c10::multiply_integers(shape(dense));
    const int64_t inner = c10::multiply_integers(dense.sizes().slice(static_cast<size_t>(end + 1)));
    if (!dense.is_contiguous()) return {dense.numel() / channels, channels, 1};
    return {dense.numel() / (channels * inner), channels, inner};
  }
};

// Throws unless the tensor has the shape of the normalized dimensions, or of dimension 0 before them, the input's
// device, and the input's dtype or float32 for a 16-bit input.
void check_parameter(const char* name, const OptionalTensor& parameter, const Tensor& input, const LayerDims& dims) {
  if (!parameter) return;
  const at::IntArrayRef shape = dims.shape(input), own = parameter->sizes();
  const bool by_sample = dims.start > 0 && own.size() == shape.size() + 1 && own[0] == input.size(0);
  TORCH_CHECK_VALUE((by_sample ? own.slice(1) : own) == shape, name, " has shape ", own, ", the normalized dimensions ",
                    "of input have shape ", shape);
  check_parameter_type(name, *parameter, input);
}

SampleParameter sample_parameter(const OptionalTensor& tensor, const Tensor& input, const LayerDims& dims) {
  return {channel_vector(tensor), tensor && tensor->dim() > static_cast<int64_t>(dims.shape(input).size())};
}

int64_t samples_of(const Tensor& input, std::initializer_list<SampleParameter> parameters) {
  for (const SampleParameter& parameter : parameters)
    if (parameter.by_sample) return input.size(0);
  return 1;
}

LayerNormCall::Result forward_kernels(const LayerNormCall& call) {
  check(call);
  const LayerDims dims{call.start_dim, call.end_dim};
  const Tensor &input = call.input, dense = dims.dense(input);
  const auto options = input.options().memory_format(at::MemoryFormat::Contiguous);
  const Tensor output = empty_output_like(dense);
  const Tensor sum = call.residual ? empty_output_like(dense) : empty_output({0}, options);
  const Tensor statistics = empty_output(dims.statistics_shape(input), options.dtype(at::kDouble));
  if (input.numel() == 0) return {output, sum, statistics.zero_()};
  const OptionalTensor weight = contiguous(call.weight), bias = contiguous(call.bias);
  const OptionalTensor residual = laid_out_as(call.residual, dense);
  LayerNormForward args{};
  args.view = dims.view(dense);
  args.dtype = dtype_of(input.scalar_type());
  args.input = dense.const_data_ptr();
  args.output = output.mutable_data_ptr();
  args.weight = sample_parameter(weight, input, dims);
  args.bias = sample_parameter(bias, input, dims);
  args.samples = samples_of(input, {args.weight, args.bias});
  args.eps = call.eps;
  args.subtract_mean = call.subtract_mean;
  args.mean = statistics.mutable_data_ptr<double>();
  args.invstd = args.mean + args.view.positions();
  args.residual = data_of(residual);
  if (call.residual) args.sum = sum.mutable_data_ptr();
  backend_of(input).layer_norm(args, input.device());
  return {output, sum, statistics};
}

// The requested gradients, uninitialized, and zero-size tensors in place of the others.
LayerNormBackwardCall::Result empty_gradients(const LayerNormBackwardCall& call, const Tensor& dense) {
  const Tensor& input = call.input;
  const auto options = input.options().memory_format(at::MemoryFormat::Contiguous);
  const at::IntArrayRef shape = LayerDims{call.start_dim, call.end_dim}.shape(input);
  const auto of_parameter = [&](bool requested, const OptionalTensor& like) {
    const at::ScalarType type = like                                 ? like->scalar_type()
                                : input.scalar_type() == at::kDouble ? at::kDouble
                                                                     : at::kFloat;
    return empty_output(!requested ? at::IntArrayRef({0}) : like ? like->sizes() : shape, options.dtype(type));
  };
  const auto& requested = call.output_mask;
  return {requested[0] ? empty_output_like(dense) : empty_output({0}, input.options()),
          of_parameter(requested[1], call.weight), of_parameter(requested[2], call.bias ? call.bias : call.weight)};
}

LayerNormBackwardCall::Result backward_kernels(const LayerNormBackwardCall& call) {
  check(call);
  const LayerDims dims{call.start_dim, call.end_dim};
  const Tensor &input = call.input, dense = dims.dense(input);
  auto gradients = empty_gradients(call, dense);
  auto& [grad_input, grad_weight, grad_bias] = gradients;
  const auto& requested = call.output_mask;
  if (input.numel() == 0) {
    grad_weight.zero_();
    grad_bias.zero_();
  }
  if (input.numel() == 0 || !(requested[0] || requested[1] || requested[2])) return gradients;
  const Tensor grad_output = laid_out_as(call.grad_output, dense);
  const OptionalTensor weight = contiguous(call.weight), grad_sum = laid_out_as(call.grad_sum, dense);
  LayerNormBackward args{};
  args.view = dims.view(dense);
  args.dtype = dtype_of(input.scalar_type());
  args.grad_output = grad_output.const_data_ptr();
  args.input = dense.const_data_ptr();
  args.weight = sample_parameter(weight, input, dims);
  args.mean = call.statistics.const_data_ptr<double>();
  args.invstd = args.mean + args.view.positions();
  args.subtract_mean = call.subtract_mean;
  args.grad_sum = data_of(grad_sum);
  if (requested[0]) args.grad_input = grad_input.mutable_data_ptr();
  if (requested[1]) args.grad_weight = sample_parameter(grad_weight, input, dims);
  if (requested[2]) args.grad_bias = sample_parameter(grad_bias, input, dims);
  args.samples = samples_of(input, {args.weight, args.grad_weight, args.grad_bias});
  backend_of(input).layer_norm_backward(args, input.device());
  return gradients;
}

}  // namespace

void check(const LayerNormCall& call) {
  const LayerDims dims{call.start_dim, call.end_dim};
  dims.check(call.input);
  check_floating(call.input, 1);
  check_parameter("weight", call.weight, call.input, dims);
  check_parameter("bias", call.bias, call.input, dims);
  check_like_input("residual", call.residual, call.input);
  check_eps(call.eps);
}

void check(const LayerNormBackwardCall& call) {
  const Tensor &input = call.input, &statistics = call.statistics;
  const LayerDims dims{call.start_dim, call.end_dim};
  dims.check(input);
  check_floating(input, 1);
  check_parameter("weight", call.weight, input, dims);
  check_parameter("bias", call.bias, input, dims);
  const at::DimVector shape = dims.statistics_shape(input);
  TORCH_CHECK_VALUE(statistics.scalar_type() == at::kDouble && statistics.is_contiguous() &&
                        statistics.sizes() == at::IntArrayRef(shape) && statistics.device() == input.device(),
                    "statistics must be contiguous float64 of shape ", at::IntArrayRef(shape), " on ", input.device());
  check_like_input("grad_output", call.grad_output, input);
  check_like_input("grad_sum", call.grad_sum, input);
}

LayerNormCall::Result layer_norm(const LayerNormCall& c) {
  static const auto op = find_operator<LayerNormCall::Signature>("normfused::layer_norm");
  return op.call(c.input, c.start_dim, c.end_dim, c.weight, c.bias, c.eps, c.residual, c.subtract_mean);
}

LayerNormBackwardCall::Result layer_norm_backward(const LayerNormBackwardCall& c) {
  static const auto op = find_operator<LayerNormBackwardCall::Signature>("normfused::layer_norm_backward");
  return op.call(c.grad_output, c.input, c.start_dim, c.end_dim, c.weight, c.bias, c.statistics, c.output_mask,
                 c.grad_sum, c.subtract_mean);
}

TORCH_LIBRARY_FRAGMENT(normfused, m) {
  m.def(
      "layer_norm(Tensor input, int start_dim, int end_dim, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? residual=None, bool subtract_mean=True) -> (Tensor output, Tensor sum, Tensor statistics)");
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor input, int start_dim, int end_dim, Tensor? weight, "
      "Tensor? bias, Tensor statistics, bool[3] output_mask, Tensor? grad_sum=None, bool subtract_mean=True) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

NF_LIBRARY_IMPL_BACKENDS(m) {
  m.impl("layer_norm", call_object<forward_kernels>());
  m.impl("layer_norm_backward", call_object<backward_kernels>());
}

}  // namespace normfused::ops
