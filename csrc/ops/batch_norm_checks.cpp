#include "ops/batch_norm_checks.h"

#include "ops/activation.h"
#include "ops/layout.h"

namespace normfused::ops {

void check_input(const at::Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() >= 2, "input needs at least 2 dimensions, got shape ", input.sizes());
  dtype_of(input.scalar_type());
}

void check_channels(const char* name, const OptionalTensor& vector, const at::Tensor& input) {
  if (!vector) return;
  TORCH_CHECK_VALUE(vector->device() == input.device(), name, " is on ", vector->device(), ", input on ",
                    input.device());
  TORCH_CHECK_VALUE(vector->dim() == 1 && vector->size(0) == input.size(1), name, " has shape ", vector->sizes(),
                    ", input has ", input.size(1), " channels");
  const at::ScalarType type = vector->scalar_type();
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

void check_statistics(const at::Tensor& statistics, const at::Tensor& input) {
  TORCH_CHECK_VALUE(statistics.scalar_type() == at::kDouble && statistics.is_contiguous() && statistics.dim() == 2 &&
                        statistics.size(0) == 2 && statistics.size(1) == input.size(1) &&
                        statistics.device() == input.device(),
                    "statistics must be contiguous float64 of shape (2, channels) on ", input.device());
}

void check_backward(const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
                    const at::Tensor& statistics, bool training, std::array<bool, 4> output_mask,
                    const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
                    std::string_view activation, double activation_param, bool from_output, const OptionalTensor& sums,
                    const OptionalTensor& count) {
  check_input(input);
  check_channels("weight", weight, input);
  check_channels("bias", bias, input);
  check_statistics(statistics, input);
  check_like_input("grad_output", grad_output, input);
  if (!mask) check_like_input("residual", residual, input);
  const Activation applied = activation_of(activation, activation_param);
  TORCH_CHECK_VALUE(!mask || (gradient_is_by_sign(applied) && mask->scalar_type() == at::kByte && mask->dim() == 1 &&
                              mask->is_contiguous() && mask->numel() == mask_bytes(input.numel()) &&
                              mask->device() == input.device()),
                    "mask must be contiguous uint8 of shape (", mask_bytes(input.numel()), ") on ", input.device(),
                    ", and the activation's gradient one by sign");
  TORCH_CHECK_VALUE(!from_output || (is_invertible(applied) && !residual && !mask),
                    "from_output needs an activation that can be undone, and neither residual nor mask");
  const at::ScalarType sums_type = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(sums.has_value() == count.has_value() && (!sums || training), "sums and count belong together");
  TORCH_CHECK_VALUE(!sums || (sums->scalar_type() == sums_type && sums->is_contiguous() && sums->dim() == 2 &&
                              sums->size(0) == 2 && sums->size(1) == input.size(1) &&
                              sums->device() == input.device() && !output_mask[1] && !output_mask[2]),
                    "sums must be contiguous ", sums_type, " of shape (2, channels) on ", input.device());
  TORCH_CHECK_VALUE(
      !count || (count->scalar_type() == at::kLong && count->numel() == 1 && count->device() == input.device()),
      "count must be one int64 on ", input.device());
}

}  // namespace normfused::ops
