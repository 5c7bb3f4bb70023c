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

constexpr bool is_integer(DType dtype) { return dtype >= DType::kUInt8; }

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

// What is applied to the normalized value, after the residual is added.
enum class ActivationKind : uint8_t {
  kIdentity,
  kRelu,
  kRelu6,
  kLeakyRelu,  // so far they are straight but for a pieces at 0
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
};

// One bit for each value, in the order of memory: whether what the activation took in was above zero. Then zeros:
// kernels read up to eight bytes at once.
constexpr int64_t kMaskPadding = 8;
constexpr int64_t mask_bytes(int64_t numel) { return (numel + 7) / 8 + kMaskPadding; }

// Where the statistics of a batch go.
struct BatchStatistics {
  ChannelVector running_mean, running_var;  // training: updated where present; inference: read
  int64_t* num_batches_tracked;             // counted up where present; training only
  double momentum;                          // NaN: cumulative average, 1 / num_batches_tracked
  double eps;
  double* mean;            // (C): what normalizes the output, kept for backward
  double* invstd;          // (C)
  int64_t correction = 1;  // running_var takes M2 / (count - correction)
  int64_t* nonfinite_batches =
      nullptr;  // (C), or null: how often a channel's statistics were not finite, and so not used
};

struct BatchNormForward : BatchStatistics {  // inference without running statistics: by mean and invstd as they are
  ChannelView view;
  DType dtype;
  const void* input;
  void* output;
  ChannelVector weight, bias;  // absent: 1, 0
  Activation activation{};
  const void* residual = nullptr;  // added before the activation; as the input in dtype and layout
  uint8_t* mask = nullptr;         // (mask_bytes), or null: not wanted

  constexpr bool fused() const {
    return activation.kind != ActivationKind::kIdentity || residual != nullptr || mask != nullptr;
  }
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
  // What the gradient passes before it comes to the normalization: as in forward, with the bias that this added. With a
  // mask neither bias nor residual is read, and the input only for statistics or grad_weight.
  Activation activation{};
  ChannelVector bias{};
  const void* residual = nullptr;
  const uint8_t* mask = nullptr;
  void* grad_residual = nullptr;  // null: not wanted; written where grad_input is
  // Whether `input` is what forward gave: x is no longer there. Only for an activation that can be undone (see
  // deactivated() in math.h), without a residual, and for channels whose weight is not 0.
  bool from_output = false;
  // Where given, the statistics were of so many values, not of the input's alone, and grad_weight and grad_bias are
  // read: they are sums over all of those.
  const int64_t* count = nullptr;

  constexpr bool fused() const {
    return activation.kind != ActivationKind::kIdentity || residual != nullptr || grad_residual != nullptr ||
           from_output;
  }
};

struct ChannelStats {
  ChannelView view;
  DType dtype;
  const void* input;
  // (C) each, double: channel_moments mean, M2, min, max; channel_sums sum, sum of squares, min, max, int64 of integers
  void* results[4];
};

// Moments as a rank sends them to others: a word for how many values a channel has, then RankMoments (see math.h) of
// each channel, in float, or in double where the values are.
constexpr int64_t rank_words(int64_t channels, DType dtype) {
  return 1 + (dtype == DType::kFloat64 ? 2 : 1) * channels;
}

struct PackMoments {
  ChannelView view;
  DType dtype;
  const void* input;
  int64_t* words;  // (rank_words)
};

// One batch's statistics from those of all ranks' shares of it. Without any values nothing is updated.
struct MergeRanks : BatchStatistics {
  int64_t ranks, channels;
  bool is_double;
  const int64_t* words;  // (ranks, rank_words), whose rows lie `stride` words apart
  int64_t stride;
  int64_t* count;  // of one value: of all ranks
};

// output = (input * scale - mean) / std, of images with `pixels` values a channel.
struct Standardize {
  int64_t images, channels, pixels;
  DType dtype, output_dtype;  // from uint8 or float32 to float32, float16 or bfloat16; from the others to themselves
  const void* input;
  void* output;                        // may be the input, where dtype and layout are the same
  bool input_is_last, output_is_last;  // whether a pixel's channels are neighbours, else a channel's pixels are
  const double* mean;                  // (C), in the host's memory
  const double* std;                   // (C), in the host's memory
  double scale;
};

// Each value divided by a power of the squares of the channels about it; or the gradient of that.
struct LocalResponseNorm {
  ChannelView view;
  DType dtype;
  const void* input;
  const void* grad_output;  // null: forward
  void* output;             // with grad_output the input's gradient
  int64_t size;
  double alpha, beta, k;

  // The window of channel c is c - left(), …, c + right(), of which as much counts as there are channels.
  constexpr int64_t left() const { return size / 2 < view.channels ? size / 2 : view.channels - 1; }
  constexpr int64_t right() const { return (size - 1) / 2 < view.channels ? (size - 1) / 2 : view.channels - 1; }
};

}  // namespace normfused
