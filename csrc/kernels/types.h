// The argument structs of all kernels: pointers, extents and dtypes. Independent of torch and of CUDA.
#pragma once

#include <cstdint>

namespace normfused {

// Storage of the two 16-bit formats. All arithmetic is in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

enum class DType : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16, kUInt8, kInt8, kInt16, kInt32, kInt64 };

constexpr bool is_integer(DType dtype) { return dtype >= DType::kUInt8; }

// A dense tensor as (outer, channels, inner): element (o, c, i) is at offset (o * channels + c) * inner + i. A position
// is a pair (o, i). inner > 1 is channels first (NCHW: outer N, inner HW); inner == 1 is channels last (NHWC: outer
// NHW).
//
// CUDA: with several samples, that many such tensors follow one another, and a channel of each has its own statistic.
struct ChannelView {
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int64_t samples = 1;
  bool alike = false;  // whether the plan of a sample must be the same for any number of samples, one among them

  constexpr int64_t positions() const { return outer * inner; }  // values per channel, of one sample
  constexpr int64_t statistics() const { return samples * channels; }
  constexpr int64_t numel() const { return samples * outer * channels * inner; }
};

// A per-channel parameter or buffer: (C) of any floating dtype, or absent.
struct ChannelVector {
  void* data = nullptr;
  DType dtype = DType::kFloat32;

  constexpr explicit operator bool() const { return data != nullptr; }
};

// The activation of the normalized value, after the residual is added.
enum class ActivationKind : uint8_t {
  kIdentity,
  kRelu,
  kRelu6,
  kLeakyRelu,  // the last of the piecewise linear ones
  kElu,
  kHardswish,
  kSigmoid,
  kTanh,
  kSilu,
  kGelu,
  kGeluTanh
};
struct Activation {
  ActivationKind kind = ActivationKind::kIdentity;
  double parameter = 0;  // leaky ReLU's negative slope, ELU's alpha

  constexpr bool is_piecewise_linear() const { return kind <= ActivationKind::kLeakyRelu; }
  constexpr bool is_transcendental() const { return !is_piecewise_linear() && kind != ActivationKind::kHardswish; }
};

// A sign mask: one bit per element, in memory order, set if the input of the activation was positive or NaN. It ends in
// padding of zeros, because kernels read eight bytes at once.
constexpr int64_t kMaskPadding = 8;
constexpr int64_t mask_bytes(int64_t numel) { return (numel + 7) / 8 + kMaskPadding; }

// The statistics of a batch: where training writes them, and how it updates the running statistics.
struct BatchStatistics {
  ChannelVector running_mean, running_var;  // training: updated if present; inference: read
  int64_t* num_batches_tracked;             // incremented if present; training only
  double momentum;                          // NaN: cumulative average, 1 / num_batches_tracked
  double eps;
  double* mean;            // (C): normalizes the output, saved for backward
  double* invstd;          // (C): 1 / sqrt(variance + eps)
  int64_t correction = 1;  // running_var is updated with M2 / (count - correction)
  // (C), or null. If present, a channel whose batch statistics are not finite does not update its running statistics,
  // and is counted here.
  int64_t* nonfinite_batches = nullptr;
};

// Inference without running statistics normalizes with the given mean and invstd.
struct BatchNormForward : BatchStatistics {
  ChannelView view;
  DType dtype;
  const void* input;
  void* output;
  ChannelVector weight, bias;  // absent: 1, 0
  Activation activation{};
  const void* residual = nullptr;  // added before the activation; same dtype and layout as the input
  uint8_t* mask = nullptr;         // (mask_bytes), written: the sign mask; or null

  constexpr bool fused() const {
    return activation.kind != ActivationKind::kIdentity || residual != nullptr || mask != nullptr;
  }
};

struct BatchNormBackward {
  ChannelView view;
  DType dtype;
  const void* grad_output;
  const void* input;
  void* grad_input;  // null if not requested
  ChannelVector weight;
  ChannelVector grad_weight, grad_bias;  // absent if not requested
  const double* mean;
  const double* invstd;
  bool training;  // whether the statistics are those of this input, so that gradients flow through them
  // Activation, bias and residual of forward, to recompute the activation's input. With a mask, bias and residual are
  // not read, and the input is read only for the gradient through the statistics and for grad_weight.
  Activation activation{};
  ChannelVector bias{};
  const void* residual = nullptr;
  const uint8_t* mask = nullptr;
  void* grad_residual = nullptr;  // null if not requested; written only with grad_input
  // Whether `input` is the output of forward, which has overwritten x. Preconditions: the activation is invertible (see
  // deactivated() in math.h), there is no residual, and no weight is 0.
  bool from_output = false;
  // If not null, the statistics are those of *count values per channel on all ranks. grad_weight and grad_bias are then
  // read: they are the sums over all ranks.
  const int64_t* count = nullptr;

  constexpr bool fused() const {
    return activation.kind != ActivationKind::kIdentity || residual != nullptr || grad_residual != nullptr ||
           from_output;
  }
};

// A dense tensor whose statistics are those of a group of neighbouring channels of one sample. Element (n, c, i) is at
// offset (n * channels + c) * inner + i, or with channels_last at (n * inner + i) * channels + c.
struct GroupView {
  int64_t samples;
  int64_t groups;
  int64_t channels;  // of all groups of a sample
  int64_t inner;     // positions of a sample
  bool channels_last;

  constexpr int64_t width() const { return channels / groups; }  // channels of a group
  constexpr int64_t count() const { return width() * inner; }    // values per statistic
  constexpr int64_t statistics() const { return samples * groups; }
  constexpr int64_t numel() const { return samples * channels * inner; }
  // The whole tensor by channels: channels last those of all samples together, else each sample has its own.
  constexpr ChannelView by_channel() const {
    return channels_last ? ChannelView{samples * inner, channels, 1} : ChannelView{1, samples * channels, inner};
  }
  // The same, with the channels of one sample after the other.
  constexpr ChannelView by_sample() const {
    return channels_last ? ChannelView{inner, channels, 1, samples, true}
                         : ChannelView{1, channels, inner, samples, true};
  }
  // The largest parts of statistics that are channels of a view: channels first the statistics themselves, whose values
  // are contiguous, else the channels.
  constexpr ChannelView reduced() const {
    return channels_last ? by_sample() : ChannelView{1, groups, count(), samples, true};
  }
};

// A weight or bias of a norm of samples: one value per channel, of shape (C), or for each sample (N, C).
struct SampleParameter : ChannelVector {
  bool by_sample = false;

  // The index of the value for channel 0 of a sample.
  constexpr int64_t first(int64_t sample, int64_t channels) const { return by_sample ? sample * channels : 0; }
};

struct GroupNormForward {
  GroupView view;
  DType dtype;
  const void* input;
  void* output;
  SampleParameter weight, bias;  // absent: 1, 0
  double eps;
  double* mean;    // (N, G), written
  double* invstd;  // (N, G), written: 1 / sqrt(variance + eps)
  Activation activation{};
  const void* residual = nullptr;  // added before the activation; same dtype and layout as the input
  uint8_t* mask = nullptr;         // (mask_bytes), written: the sign mask; or null

  constexpr bool fused() const {
    return activation.kind != ActivationKind::kIdentity || residual != nullptr || mask != nullptr;
  }
};

// Activation, bias, residual and mask are as in BatchNormBackward.
struct GroupNormBackward {
  GroupView view;
  DType dtype;
  const void* grad_output;
  const void* input;
  void* grad_input;  // null if not requested
  SampleParameter weight;
  SampleParameter grad_weight, grad_bias;  // absent if not requested
  const double* mean;
  const double* invstd;
  Activation activation{};
  SampleParameter bias{};
  const void* residual = nullptr;
  const uint8_t* mask = nullptr;
  void* grad_residual = nullptr;  // null if not requested; written only with grad_input

  constexpr bool fused() const {
    return activation.kind != ActivationKind::kIdentity || residual != nullptr || grad_residual != nullptr;
  }
};

// Layer norm and RMS norm: each position of the view is normalized over its channels.
struct LayerNormForward {
  ChannelView view;
  int64_t samples;  // with parameters by sample, how many there are, each with outer / samples outer indices; else 1
  DType dtype;
  const void* input;
  void* output;
  SampleParameter weight, bias;  // absent: 1, 0
  double eps;
  bool subtract_mean;  // false: RMS norm, the mean counts as 0
  double* mean;        // (positions), written
  double* invstd;      // (positions), written: 1 / sqrt(variance + eps)
  // If not null, input + residual is written to `sum`, rounded to the dtype, and normalized.
  const void* residual = nullptr;
  void* sum = nullptr;
};

struct LayerNormBackward {
  ChannelView view;
  int64_t samples;
  DType dtype;
  const void* grad_output;
  const void* input;  // that was normalized: forward's `sum` if there was a residual
  void* grad_input;   // null if not requested
  SampleParameter weight;
  SampleParameter grad_weight, grad_bias;  // absent if not requested
  const double* mean;
  const double* invstd;
  bool subtract_mean;
  const void* grad_sum = nullptr;  // the gradient of `sum` as an output, or null: added to grad_input
};

struct ChannelStats {
  ChannelView view;
  DType dtype;
  const void* input;
  // (C) each, written. channel_moments: mean, M2, minimum, maximum. channel_sums: sum, sum of squares, minimum,
  // maximum.
  double* results[4];
};

// The sum and the sum of squares of integers, exact. They can exceed 64 bits, so each is written as parts, which are
// digits of base 2^32 that have not been carried: a sum is parts[0] + 2^32 parts[1] + ....
struct IntegerSums {
  static constexpr int kSum = 0, kSquares = 2, kMin = 6, kMax = 7, kRows = 8;

  ChannelView view;
  DType dtype;
  const void* input;
  // (kRows, C): two parts of the sum, four of the sum of squares, minimum and maximum. Parts that are 0 for every value
  // of the dtype are not written.
  int64_t* rows;

  // The number of values per channel up to which no part overflows int64.
  static constexpr int64_t max_count(DType dtype) {
    const int bits = dtype == DType::kInt64 ? 34 : dtype == DType::kInt32 ? 32 : dtype == DType::kInt16 ? 30 : 16;
    return int64_t{1} << (63 - bits);
  }
};

// Size in words of the message with a rank's moments: one word for the number of values per channel, then RankMoments
// (see math.h) of each channel, in double for float64 input, else in float.
constexpr int64_t rank_words(int64_t channels, DType dtype) {
  return 1 + (dtype == DType::kFloat64 ? 2 : 1) * channels;
}

struct PackMoments {
  ChannelView view;
  DType dtype;
  const void* input;
  int64_t* words;  // (rank_words), written
  double eps;      // of the batch norm
};

// The statistics of a batch from the moments of all ranks. If the batch has no values, nothing is updated.
struct MergeRanks : BatchStatistics {
  int64_t ranks, channels;
  bool is_double;
  const int64_t* words;  // (ranks, rank_words), with a row stride of `stride` words
  int64_t stride;
  int64_t* count;  // (1), written: number of values per channel on all ranks
};

// output = (input * scale - mean) / std, per channel, for images with `pixels` pixels.
struct Standardize {
  int64_t images, channels, pixels;
  DType dtype, output_dtype;  // uint8 or float32 to float32, float16 or bfloat16; other dtypes to the same dtype
  const void* input;
  void* output;                        // may be the input if dtype and layout are the same
  bool input_is_last, output_is_last;  // channels last (NHWC), else planar (NCHW)
  const double* mean;                  // (C), in host memory
  const double* std;                   // (C), in host memory
  double scale;
};

// Local response normalization: x * (k + alpha / size * sum of squares over a window of channels)^-beta; or its
// gradient.
struct LocalResponseNorm {
  ChannelView view;
  DType dtype;
  const void* input;
  const void* grad_output;  // null: forward
  void* output;             // the gradient of the input if grad_output is not null
  int64_t size;
  double alpha, beta, k;

  // The window of channel c is c - left(), …, c + right(), clipped to the existing channels.
  constexpr int64_t left() const { return size / 2 < view.channels ? size / 2 : view.channels - 1; }
  constexpr int64_t right() const { return (size - 1) / 2 < view.channels ? (size - 1) / 2 : view.channels - 1; }
};

}  // namespace normfused
