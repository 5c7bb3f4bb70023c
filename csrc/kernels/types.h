// What a kernel is told about its operands: pointers, extents and dtypes. No torch, no CUDA.
#pragma once

#include <cstdint>

namespace normfused {

// Storage of the two 16-bit formats. Arithmetic is always done in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

enum class DType : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16, kUInt8, kInt8, kInt16, kInt32, kInt64 };

// A dense tensor as (outer, channels, inner): the value (o, c, i) lies at (o * channels + c) * inner + i.
// inner > 1 is channels first, inner == 1 is channels last; there is no third layout.
struct ChannelView {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  constexpr int64_t positions() const { return outer * inner; }  // values per channel
  constexpr int64_t numel() const { return outer * channels * inner; }
};

// A per-channel parameter or buffer: C values of any floating dtype, or absent.
struct ChannelVector {
  void* data = nullptr;
  DType dtype = DType::kFloat32;

  constexpr explicit operator bool() const { return data != nullptr; }
};

struct BatchNormForward {
  ChannelView view;
  DType dtype;
  const void* input;
  void* output;
  ChannelVector weight, bias;               // absent: 1, 0
  ChannelVector running_mean, running_var;  // training: updated where present; inference: read
  int64_t* num_batches_tracked;             // counted up where present; training only
  double momentum;                          // NaN: cumulative average, 1 / num_batches_tracked
  double eps;
  double* mean;    // (C): what normalized the output, kept for backward
  double* invstd;  // (C)
};

struct BatchNormBackward {
  ChannelView view;
  DType dtype;
  const void* grad_output;
  const void* input;
  void* grad_input;  // null: not wanted
  ChannelVector weight;
  ChannelVector grad_weight, grad_bias;  // absent: not wanted
  const double* mean;
  const double* invstd;
  bool training;  // statistics came from this input, so gradients flow through them
};

struct ChannelStats {
  ChannelView view;
  DType dtype;
  const void* input;
  // (C) each, double: channel_moments mean, M2, min, max; channel_sums sum, sum of squares, int64 for integers
  void* results[4];
};

struct Standardize {
  ChannelView view;
  DType dtype, output_dtype;
  const void* input;
  void* output;
  ChannelVector mean, std;
};

}  // namespace normfused
