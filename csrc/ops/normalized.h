// The normalization of values by statistics of their own, in ATen operators: for the composites of the norms whose
// statistics belong to a sample (see derivatives.h).
#pragma once

#include <ATen/Functions.h>
#include <ATen/OpMathType.h>

#include <utility>

namespace normfused::ops {

inline at::Tensor average(const at::Tensor& values, at::IntArrayRef dims) {
  return values.mean(dims, /*keepdim=*/true);
}

// Mean and biased variance over `dims`, which are kept with size 1. Without subtract_mean, 0 and the mean of squares.
inline std::pair<at::Tensor, at::Tensor> moments(const at::Tensor& x, at::IntArrayRef dims, bool subtract_mean) {
  if (!subtract_mean) {
    const at::Tensor squares = average(x * x, dims);
    return {at::zeros_like(squares), squares};
  }
  const at::Tensor mean = average(x, dims), deviation = x - mean;
  return {mean, average(deviation * deviation, dims)};
}

// Mean and inverse standard deviation.
inline std::pair<at::Tensor, at::Tensor> statistics_of(const at::Tensor& x, at::IntArrayRef dims, double eps,
                                                       bool subtract_mean) {
  const auto [mean, var] = moments(x.to(at::kDouble), dims, subtract_mean);
  return {mean, (var + eps).rsqrt()};
}

struct Normalized {
  at::Tensor deviation;  // (x - mean) * invstd
  at::Tensor invstd;     // of size 1 in the dimensions of a statistic
};

// `mean` and `invstd` are float64 and broadcast with x. The statistics are functions of x with their values.
inline Normalized normalized(const at::Tensor& x, at::IntArrayRef dims, const at::Tensor& mean,
                             const at::Tensor& invstd, bool subtract_mean) {
  const at::Tensor shifted = (x.to(at::kDouble) - mean).to(at::toOpMathType(x.scalar_type()));
  const auto [rest, var] = moments(shifted, dims, subtract_mean);
  const at::Tensor rstd = (var + (invstd.to(shifted.scalar_type()).pow(-2) - var).detach()).rsqrt();
  return {(shifted - rest) * rstd, rstd};
}

// The gradient of x from that of the deviation.
inline at::Tensor gradient_of_normalized(const at::Tensor& grad, const Normalized& of_x, at::IntArrayRef dims,
                                         bool subtract_mean) {
  const at::Tensor& d = of_x.deviation;
  const at::Tensor rest = grad - d * average(grad * d, dims);
  return (subtract_mean ? rest - average(grad, dims) : rest) * of_x.invstd;
}

}  // namespace normfused::ops
