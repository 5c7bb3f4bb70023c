// Activations of 16-bit data and their slopes, at every value of both formats. The kernels approximate them: the error
// must stay below `allowance` times half a unit in the last place of the result, beyond its rounding.
#pragma once

#include "values.h"

namespace normfused::testing {

// Half a unit in the last place at a value, for a format with these mantissa digits and minimum exponent.
inline double half_unit(double value, int digits, int min_exponent) {
  const bool is_tiny = value == 0 || std::isnan(value);
  return std::ldexp(0.5, (is_tiny ? min_exponent : std::max(std::ilogb(value), min_exponent)) - digits);
}

inline const ActivationKind kTranscendental[] = {ActivationKind::kElu,  ActivationKind::kSigmoid,
                                                 ActivationKind::kTanh, ActivationKind::kSilu,
                                                 ActivationKind::kGelu, ActivationKind::kGeluTanh};

struct ValueAndSlope {
  double value, slope;
};

// ELU with alpha 1.
inline ValueAndSlope exact_activation(ActivationKind kind, double z) {
  const double sigmoid = 1 / (1 + std::exp(-z)), complement = 1 / (1 + std::exp(z));
  switch (kind) {
    case ActivationKind::kElu:
      return {z > 0 ? z : std::expm1(z), z > 0 ? 1 : std::exp(z)};
    case ActivationKind::kSigmoid:
      return {sigmoid, sigmoid * complement};
    case ActivationKind::kTanh:
      return {std::tanh(z), std::pow(1 / std::cosh(z), 2)};
    case ActivationKind::kSilu:
      return {z * sigmoid, sigmoid + z * (sigmoid * complement)};
    case ActivationKind::kGelu: {
      const double below = std::erfc(z * -std::sqrt(0.5)) / 2;
      return {z * below, below + z * std::exp(-z * z / 2) / std::sqrt(8 * std::atan(1))};
    }
    default: {
      const double factor = std::sqrt(2 / std::atan(1)), p = factor * (z + 0.044715 * z * z * z);
      const double s = 1 / (1 + std::exp(-p)), slope = factor * (1 + 3 * 0.044715 * z * z);
      return {z * s, s + z * (s / (1 + std::exp(p))) * slope};
    }
  }
}

// Runs evaluation with statistics that change nothing, and its backward pass. Returns the number of values.
template <class T, class Backend>
int64_t run_every_value(Backend& backend, ActivationKind kind, int digits, int min_exponent, double allowance) {
  constexpr int64_t kValues = 65536;
  Buffer<T> input(kValues, 0), output(kValues, 0), grad(kValues, 0), grad_input(kValues, 0);
  for (int64_t i = 0; i < kValues; ++i) {
    input.data[i].bits = static_cast<uint16_t>(i);
    encode(grad.data + i, 1);
  }
  double running_mean = 0, running_var = 1, mean, invstd;
  BatchNormForward forward{};
  forward.view = {1, 1, kValues};
  forward.dtype = Format<T>::dtype;
  forward.input = input.data;
  forward.output = output.data;
  forward.running_mean = {&running_mean, DType::kFloat64};
  forward.running_var = {&running_var, DType::kFloat64};
  forward.mean = &mean;
  forward.invstd = &invstd;
  forward.activation = {kind, 1};
  backend.batch_norm_inference(forward);
  BatchNormBackward backward{};
  backward.view = forward.view;
  backward.dtype = forward.dtype;
  backward.grad_output = grad.data;
  backward.input = input.data;
  backward.grad_input = grad_input.data;
  backward.mean = &mean;
  backward.invstd = &invstd;
  backward.activation = forward.activation;
  backend.batch_norm_backward(backward);

  const double bound = 1 + allowance, underflow = 1e-36;  // of the exponential
  for (int64_t i = 0; i < kValues; ++i) {
    const double z = decode(input.data + i);
    if (kind == ActivationKind::kGeluTanh && std::abs(z) > 1e9) continue;  // the cube overflows float
    const ValueAndSlope exact = exact_activation(kind, z);
    current = std::string(Format<T>::name) + " activation " + std::to_string(static_cast<int>(kind)) + " of " +
              std::to_string(z);
    expect_near("output", i, decode(output.data + i), exact.value,
                bound * half_unit(exact.value, digits, min_exponent) + underflow);
    // The slopes of SiLU and GELU are differences, as exact as float near a zero.
    expect_near("slope", i, decode(grad_input.data + i), exact.slope,
                bound * half_unit(exact.slope, digits, min_exponent) + 1e-6);
  }
  return kValues;
}

}  // namespace normfused::testing
