#include "ops/batch_norm_checks.h"

#include "ops/layout.h"

namespace normfused::ops {

namespace {

bool is_matrix(const at::Tensor& tensor, at::ScalarType type, const at::Tensor& input) {
  return tensor.scalar_type() == type && tensor.is_contiguous() && tensor.dim() == 2 && tensor.size(0) == 2 &&
         tensor.size(1) == input.size(1) && tensor.device() == input.device();
}

void check_sums(const BatchNormBackwardCall& call) {
  const at::Tensor& input = call.input;
  TORCH_CHECK_VALUE(call.sums.has_value() == call.count.has_value() && (!call.sums || call.training),
                    "sums and count must be given together, and in training");
  if (!call.sums) return;
  const at::ScalarType type = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(is_matrix(*call.sums, type, input) && !call.output_mask[1] && !call.output_mask[2],
                    "sums must be contiguous ", type, " of shape (2, channels) on ", input.device(),
                    ", without gradients of weight and bias");
  TORCH_CHECK_VALUE(
      call.count->scalar_type() == at::kLong && call.count->numel() == 1 && call.count->device() == input.device(),
      "count must be one int64 on ", input.device());
}

}  // namespace

void check_channels(const char* name, const OptionalTensor& vector, const at::Tensor& input) {
  if (!vector) return;
  TORCH_CHECK_VALUE(vector->dim() == 1 && vector->size(0) == input.size(1), name, " has shape ", vector->sizes(),
                    ", input has ", input.size(1), " channels");
  check_parameter_type(name, *vector, input);
}

void check_parameter_type(const char* name, const at::Tensor& parameter, const at::Tensor& input) {
  TORCH_CHECK_VALUE(parameter.device() == input.device(), name, " is on ", parameter.device(), ", input on ",
                    input.device());
  const at::ScalarType type = parameter.scalar_type();
  const bool narrow = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  TORCH_CHECK_TYPE(type == input.scalar_type() || (narrow && type == at::kFloat), name, " is ", type, " for input of ",
                   input.scalar_type());
}

void check_like_input(const char* name, const OptionalTensor& tensor, const at::Tensor& input) {
  if (!tensor) return;
  TORCH_CHECK_VALUE(tensor->sizes() == input.sizes(), name, " has shape ", tensor->sizes(), ", input ", input.sizes());
  TORCH_CHECK_TYPE(tensor->scalar_type() == input.scalar_type(), name, " is ", tensor->scalar_type(), ", input ",
                   input.scalar_type());
  TORCH_CHECK_VALUE(tensor->device() == input.device(), name, " is on ", tensor->device(), ", input on ",
                    input.device());
}

void check_operands(const BatchNormOptions& options, const OptionalTensor& running_mean,
                    const OptionalTensor& running_var) {
  check_floating(options.input);
  check_channels("weight", options.weight, options.input);
  check_channels("bias", options.bias, options.input);
  check_channels("running_mean", running_mean, options.input);
  check_channels("running_var", running_var, options.input);
}

void check_training_count(int64_t count, const at::Tensor& input) {
  TORCH_CHECK_VALUE(count != 1, "expected more than 1 value per channel when training, got ", input.sizes());
}

void check_statistics(const at::Tensor& statistics, const at::Tensor& input) {
  TORCH_CHECK_VALUE(is_matrix(statistics, at::kDouble, input),
                    "statistics must be contiguous float64 of shape (2, channels) on ", input.device());
}

void check_mask(const at::Tensor& mask, const at::Tensor& input, const Activation& activation) {
  TORCH_CHECK_VALUE(gradient_is_by_sign(activation) && mask.scalar_type() == at::kByte && mask.dim() == 1 &&
                        mask.is_contiguous() && mask.numel() == mask_bytes(input.numel()) &&
                        mask.device() == input.device(),
                    "mask needs the activation relu or leaky_relu, and must be contiguous uint8 of shape (",
                    mask_bytes(input.numel()), ") on ", input.device());
}

void check_backward(const BatchNormBackwardCall& call) {
  const at::Tensor& input = call.input;
  check_floating(input);
  check_channels("weight", call.weight, input);
  check_channels("bias", call.bias, input);
  check_statistics(call.statistics, input);
  check_like_input("grad_output", call.grad_output, input);
  if (!call.mask) check_like_input("residual", call.residual, input);
  const Activation activation = activation_of(call.activation, call.activation_param);
  if (call.mask) check_mask(*call.mask, input, activation);
  TORCH_CHECK_VALUE(!call.from_output || (is_invertible(activation) && !call.residual && !call.mask),
                    "from_output needs an invertible activation, and neither residual nor mask");
  check_sums(call);
}

}  // namespace normfused::ops
