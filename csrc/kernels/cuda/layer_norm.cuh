// Layer norm and RMS norm: what rows (layer_norm_rows.cuh) and columns (layer_norm_columns.cuh) of memory share. A
// statistic is that of one position over all channels, and a parameter that of one channel. The formulas are those of
// math.h: d = (x - mean) * invstd, and k = grad_output * weight is its gradient.
#pragma once

#include "kernels/cuda/channel_vector.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/math.h"

namespace normfused::cuda {

// Reads n consecutive entries from an index on, which is a multiple of n; all are `absent` if there is no vector. The
// vector begins on a multiple of kAccessBytes, unless n is 1.
template <class S, int n>
NF_DEVICE void read_entries(const ChannelVector& vector, int64_t index, S absent, S (&entries)[n]) {
  const auto convert = [&](auto type_of_entry) {
    using T = decltype(type_of_entry);
    const auto loaded = Vector<T, n>::load(static_cast<const T*>(vector.data) + index);
#pragma unroll
    for (int i = 0; i < n; ++i) entries[i] = widen<S>(loaded.value[i]);
  };
  if (!vector) {
#pragma unroll
    for (int i = 0; i < n; ++i) entries[i] = absent;
    return;
  }
  switch (vector.dtype) {
    case DType::kFloat64:
      return convert(double{});
    case DType::kFloat16:
      return convert(__half{});
    case DType::kBFloat16:
      return convert(__nv_bfloat16{});
    default:
      return convert(float{});
  }
}

// The constants of one statistic in backward: d = (x - pivot) * scale + forward_shift, and
// grad_input = k * scale + (x - pivot) * slope + shift.
template <class S>
struct LayerCoefficients {
  S pivot, scale, forward_shift, slope, shift;
};

// `sums`: of k and of k * (x - pivot), over all channels.
template <class S>
NF_DEVICE LayerCoefficients<S> layer_coefficients(const LayerNormBackward& args, const LayerStatistics& statistics,
                                                  const double (&sums)[2]) {
  const auto forward = forward_coefficients<S>({statistics.mean, statistics.invstd, 1, 0});
  const auto k = layer_backward_coefficients<S>(statistics, args.view.channels, args.subtract_mean, sums[0], sums[1]);
  return {forward.pivot, forward.scale, forward.shift, k.slope, k.shift};
}

// grad_input and d of one value.
template <class S>
NF_DEVICE S layer_gradient(const LayerCoefficients<S>& c, S x, S grad, S weight) {
  return grad * weight * c.scale + ((x - c.pivot) * c.slope + c.shift);
}
template <class S>
NF_DEVICE S layer_deviation(const LayerCoefficients<S>& c, S x) {
  return (x - c.pivot) * c.scale + c.forward_shift;
}

// input + residual, rounded to T.
template <class T, int n>
NF_DEVICE Vector<T, n> add_residual(const Vector<T, n>& input, const Vector<T, n>& residual) {
  using S = compute_t<T>;
  Vector<T, n> sum;
#pragma unroll
  for (int i = 0; i < n; ++i) sum.value[i] = narrow<T>(widen<S>(input.value[i]) + widen<S>(residual.value[i]));
  return sum;
}

}  // namespace normfused::cuda
