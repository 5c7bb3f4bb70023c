// Access to per-channel parameters and buffers, whose dtype can differ from the data's and is known only at run time.
#pragma once

#include "kernels/cuda/vector.cuh"
#include "kernels/types.h"

namespace normfused::cuda {

// The channel's entry, or `absent` if there is no vector.
NF_DEVICE double read(const ChannelVector& vector, int64_t channel, double absent) {
  if (!vector) return absent;
  switch (vector.dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(vector.data)[channel];
    case DType::kFloat16:
      return widen<double>(static_cast<const __half*>(vector.data)[channel]);
    case DType::kBFloat16:
      return widen<double>(static_cast<const __nv_bfloat16*>(vector.data)[channel]);
    default:
      return widen<double>(static_cast<const float*>(vector.data)[channel]);
  }
}

// Starts to fetch the channel's entry into the L2 cache, if the vector is present.
NF_DEVICE void prefetch_entry(const ChannelVector& vector, int64_t channel) {
  const int size = vector.dtype == DType::kFloat64 ? 8 : vector.dtype == DType::kFloat32 ? 4 : 2;
  if (vector) prefetch_address(static_cast<const char*>(vector.data) + channel * size);
}

// Writes the channel's entry, rounded once from double. Does nothing if the vector is absent.
NF_DEVICE void write(const ChannelVector& vector, int64_t channel, double value) {
  if (!vector) return;
  switch (vector.dtype) {
    case DType::kFloat64:
      static_cast<double*>(vector.data)[channel] = value;
      break;
    case DType::kFloat16:
      static_cast<__half*>(vector.data)[channel] = __double2half(value);
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(vector.data)[channel] = __double2bfloat16(value);
      break;
    default:
      static_cast<float*>(vector.data)[channel] = static_cast<float>(value);
  }
}

// Writes entry i of a parameter's gradient, from the sums of each sample: those of one sample, or of
// all samples in order.
struct WriteParameterGradient {
  const double* sums;  // of sample 0; those of the next begin `stride` values after
  int64_t stride;
  SampleParameter output;
  int64_t samples, channels;

  NF_DEVICE void operator()(int64_t i) const {
    const int64_t sample = output.by_sample ? i / channels : 0, channel = i - sample * channels;
    double total = 0;
    for (int64_t s = sample; s < (output.by_sample ? sample + 1 : samples); ++s) total += sums[s * stride + channel];
    write(output, i, total);
  }
};

}  // namespace normfused::cuda
