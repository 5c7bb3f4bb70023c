// Batch norm: what is done per value, and what is done once for each channel.
#pragma once

#include "kernels/cuda/channel_stats.cuh"
#include "kernels/cuda/elementary.cuh"

namespace normfused::cuda {

// Calls f with the activation, whose kind the compiler then knows, or its pieces: one branch for all values of a
// vector.
template <class S, class F>
NF_DEVICE void for_activation(const Activation& activation, const F& f) {
  if (activation.is_piecewise_linear()) return f(piecewise_linear<S>(activation));
  const double parameter = activation.parameter;
  switch (activation.kind) {
    case ActivationKind::kElu:
      return f(Activation{ActivationKind::kElu, parameter});
    case ActivationKind::kHardswish:
      return f(Activation{ActivationKind::kHardswish, parameter});
    case ActivationKind::kSigmoid:
      return f(Activation{ActivationKind::kSigmoid, parameter});
    case ActivationKind::kTanh:
      return f(Activation{ActivationKind::kTanh, parameter});
    case ActivationKind::kSilu:
      return f(Activation{ActivationKind::kSilu, parameter});
    case ActivationKind::kGelu:
      return f(Activation{ActivationKind::kGelu, parameter});
    case ActivationKind::kGeluTanh:
      return f(Activation{ActivationKind::kGeluTanh, parameter});
    default:
      return;
  }
}

// The bits of n values from an offset on, a multiple of n.
template <int n>
NF_DEVICE uint32_t load_bits(const uint8_t* bits, int64_t offset) {
  return bits[offset / 8] >> (offset % 8) & kWhole<n>;
}

// A byte at once, or single bits of what was zero.
template <int n>
NF_DEVICE void store_bits(uint8_t* bits, int64_t offset, uint32_t values, uint32_t mask) {
  static_assert(n == 8 || n == 1);
  if constexpr (n == 8)
    bits[offset / 8] = static_cast<uint8_t>(values & mask);
  else if (values & mask)
    atomicOr(reinterpret_cast<unsigned*>(bits) + offset / 32, 1u << (offset % 32));
}

// z = (x - pivot) * scale + shift. Fused: z + residual, activated; the residual may be null.
template <class T_, bool kFused = false>
struct NormalizeOp {
  using T = T_;
  using Output = T;
  using S = compute_t<T>;
  static constexpr int kInputs = kFused ? 2 : 1, kRequired = 1, kOutputs = 1, kCoefficients = 3;
  static constexpr bool kWritesBits = kFused, kPrepares = false;

  const T* tensor;
  Output* target;
  const S* table;
  int64_t* counter;  // counted up by the first block, once all readers of the old value are done; or null
  const T* residual;
  Activation activation;
  uint8_t* bits;
  uint8_t* padding = nullptr;  // past the last bit, for the first block to clear; or null

  NF_DEVICE const T* input(int k) const { return k == 0 ? tensor : residual; }
  NF_DEVICE Output* output(int) const { return target; }

  template <int n, class Choose>
  NF_DEVICE void operator()(const S (&x)[kInputs][n], S (&y)[1][n], const Choose& choose, int64_t offset,
                            uint32_t mask) const {
    uint32_t positive = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const auto& c = choose(i);
      y[0][i] = (x[0][i] - c.k[0]) * c.k[1] + c.k[2];
      if constexpr (kFused) {
        y[0][i] += x[1][i];
        positive |= static_cast<uint32_t>(!(y[0][i] <= 0)) << i;
      }
    }
    if constexpr (kFused) {
      if (bits != nullptr) store_bits<n>(bits, offset, positive, mask);
      for_activation<S>(activation, [&](const auto& known) {
#pragma unroll
        for (int i = 0; i < n; ++i) y[0][i] = activated<elementary_t<T>, S>(known, y[0][i]);
      });
    }
  }
  NF_DEVICE void prologue() const {
    if (blockIdx.x != 0) return;
    if (counter != nullptr && threadIdx.x == 0) ++*counter;
    if (kFused && padding != nullptr && threadIdx.x < kMaskPadding) padding[threadIdx.x] = 0;
  }
};

// From the output, puts z where the output was; elsewhere z, without the residual, is the normalized value.
template <int n, class S, class Normalize>
NF_DEVICE void find_z(bool from_output, const Activation& activation, S (&x)[n], S (&z)[n],
                      const Normalize& normalize) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (from_output) x[i] = deactivated(piecewise_linear<S>(activation), x[i]);
    z[i] = from_output ? x[i] : normalize(i, x[i]);
  }
}

// Turns gradients of the output into those of z, which is given without the residual.
template <class E, int n, class S>
NF_DEVICE void to_gradient_of_z(const Activation& activation, S (&grad)[n], const S (&z)[n], const S (&residual)[n],
                                bool by_bits, uint32_t bits) {
  if (by_bits) {
    const PiecewiseLinear<S> pieces = piecewise_linear<S>(activation);
#pragma unroll
    for (int i = 0; i < n; ++i) grad[i] = bits >> i & 1 ? grad[i] : sloped(pieces, grad[i]);
    return;
  }
  for_activation<S>(activation, [&](const auto& known) {
#pragma unroll
    for (int i = 0; i < n; ++i) grad[i] = activation_gradient<E, S>(known, z[i] + residual[i], grad[i]);
  });
}

// Rows of the table of coefficients in backward. The last, forward's shift, is there only where z is needed.
struct Row {
  static constexpr int kScale = 0, kPivot = 1, kSlope = 2, kShift = 3, kForwardShift = 4;
};

// grad_input = g * scale + (x - pivot) * slope + shift, where g is the gradient of z; grad_residual = g. Where the
// statistics are constants it is g * scale: x then has no part in it, be it infinite.
template <class T_, bool kFused>
struct GradInputOp {
  using T = T_;
  using Output = T;
  using S = compute_t<T>;
  static constexpr int kInputs = kFused ? 3 : 2, kRequired = kFused ? 1 : 2, kOutputs = kFused ? 2 : 1;
  static constexpr int kCoefficients = kFused ? 5 : 4;
  static constexpr bool kWritesBits = false, kPrepares = false;

  const T* grad_output;
  const T* tensor;  // fused: may be null where neither statistics nor activation ask for it
  T* grad_input;
  const S* table;
  const T* residual;
  T* grad_residual;
  Activation activation;
  const uint8_t* bits;
  bool training, from_output;

  NF_DEVICE const T* input(int k) const { return k == 0 ? grad_output : k == 1 ? tensor : residual; }
  NF_DEVICE T* output(int k) const { return k == 0 ? grad_input : grad_residual; }

  template <int n, class Choose>
  NF_DEVICE void operator()(const S (&x)[kInputs][n], S (&y)[kOutputs][n], const Choose& choose, int64_t offset,
                            uint32_t) const {
    if constexpr (!kFused) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const auto& c = choose(i);
        y[0][i] = x[0][i] * c.k[Row::kScale] + ((x[1][i] - c.k[Row::kPivot]) * c.k[Row::kSlope] + c.k[Row::kShift]);
      }
    } else {
      S value[n], z[n];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        y[1][i] = x[0][i];
        value[i] = x[1][i];
      }
      find_z(from_output, activation, value, z, [&](int i, S v) {
        const auto& c = choose(i);
        return (v - c.k[Row::kPivot]) * c.k[Row::kScale] + c.k[Row::kForwardShift];
      });
      to_gradient_of_z<elementary_t<T>>(activation, y[1], z, x[2], bits != nullptr,
                                        bits != nullptr ? load_bits<n>(bits, offset) : 0);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const auto& c = choose(i);
        const S through = (value[i] - c.k[Row::kPivot]) * c.k[Row::kSlope] + c.k[Row::kShift];
        y[0][i] = y[1][i] * c.k[Row::kScale] + (training ? through : 0);
      }
    }
  }
  NF_DEVICE void prologue() const {}
};

// grad_output * scale: where the statistics are constants and nothing follows.
template <class T_>
struct ScaleOp {
  using T = T_;
  using Output = T;
  using S = compute_t<T>;
  static constexpr int kInputs = 1, kRequired = 1, kOutputs = 1, kCoefficients = 1;
  static constexpr bool kWritesBits = false, kPrepares = false;

  const T* grad_output;
  T* grad_input;
  const S* table;

  NF_DEVICE const T* input(int) const { return grad_output; }
  NF_DEVICE T* output(int) const { return grad_input; }
  template <int n, class Choose>
  NF_DEVICE void operator()(const S (&x)[1][n], S (&y)[1][n], const Choose& choose, int64_t, uint32_t) const {
#pragma unroll
    for (int i = 0; i < n; ++i) y[0][i] = x[0][i] * choose(i).k[0];
  }
  NF_DEVICE void prologue() const {}
};

// Sums of g and of g * (x - pivot), where g is the gradient of z and pivot is the mean rounded to S.
template <class T_, bool kFused>
struct GradSumsOp {
  using T = T_;
  using S = compute_t<T>;
  using Sum = double;
  static constexpr int kInputs = kFused ? 3 : 2, kRequired = 2, kSums = 2;
  static constexpr bool kRecomputes = false, kStartsFromMemory = true;

  struct Plain {
    S pivot, sum, product;
  };
  struct Fused : Plain {
    S scale, shift;  // of z
  };
  using State = std::conditional_t<kFused, Fused, Plain>;

  BatchNormBackward args;
  ChannelView view = args.view;

  NF_DEVICE const T* input(int k) const {
    return static_cast<const T*>(k == 0 ? args.grad_output : k == 1 ? args.input : args.residual);
  }
  static NF_DEVICE double empty(int) { return 0; }
  static NF_DEVICE double join(int, double a, double b) { return a + b; }
  NF_DEVICE State start(int64_t channel) const {
    const auto k = forward_coefficients<S>(
        normalization_of(args, channel, read(args.weight, channel, 1), read(args.bias, channel, 0)));
    State state{};
    state.pivot = k.pivot;
    if constexpr (kFused) {
      state.scale = k.scale;
      state.shift = k.shift;
    }
    return state;
  }
  template <int n>
  NF_DEVICE uint32_t bits(int64_t offset) const {
    return kFused && args.mask != nullptr ? load_bits<n>(args.mask, offset) : 0;
  }

  template <int n, bool kMasked>
  NF_DEVICE void accumulate(State& state, const S (&values)[kInputs][n], uint32_t mask, uint32_t bits, bool) const {
    constexpr int kChains = n < 4 ? n : 4;
    S grad[n], value[n];
#pragma unroll
    for (int i = 0; i < n; ++i) {
      grad[i] = values[0][i];
      value[i] = values[1][i];
    }
    if constexpr (kFused) {
      S z[n];
      find_z(args.from_output, args.activation, value, z,
             [&](int, S v) { return (v - state.pivot) * state.scale + state.shift; });
      to_gradient_of_z<elementary_t<T>>(args.activation, grad, z, values[2], args.mask != nullptr, bits);
    }
    S sum[kChains]{}, product[kChains]{};
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const bool counts = !kMasked || (mask >> i & 1);
      sum[i % kChains] += counts ? grad[i] : 0;
      product[i % kChains] += counts ? grad[i] * (value[i] - state.pivot) : 0;
    }
#pragma unroll
    for (int i = 1; i < kChains; ++i) {
      sum[0] += sum[i];
      product[0] += product[i];
    }
    state.sum += sum[0];
    state.product += product[0];
  }

  NF_DEVICE void sums(const State& state, int64_t, int64_t, Sum (&sums)[2]) const {
    sums[0] = static_cast<double>(state.sum);
    sums[1] = static_cast<double>(state.product);
  }
  NF_DEVICE void results(int64_t, Sum (&)[2]) const {}
};

// What follows is done once for each channel. A table of coefficients has one row for each of the Op's, of all
// channels.

template <class S>
NF_DEVICE void write_row(S* table, int64_t channels, int64_t c, const ForwardCoefficients<S>& k) {
  table[c] = k.pivot;
  table[channels + c] = k.scale;
  table[2 * channels + c] = k.shift;
}

// What an update starts from. All loads of a channel come before all stores: they are on their way together.
struct RunningStatistics {
  double mean, var;
  int64_t batches;  // counts this one; read only where its update is left to a later launch
};
NF_DEVICE RunningStatistics load_running(const BatchStatistics& args, int64_t c) {
  const bool cumulative = args.momentum != args.momentum && args.num_batches_tracked != nullptr;
  return {read(args.running_mean, c, 0), read(args.running_var, c, 0), cumulative ? *args.num_batches_tracked + 1 : 1};
}

// Returns invstd.
NF_DEVICE double finish_statistics(const BatchStatistics& args, int64_t c, const Moments& moments,
                                   const RunningStatistics& running) {
  const double factor = update_factor(args.momentum, running.batches);
  const FinishedStatistics finished = finish(moments, args, factor, running.mean, running.var);
  args.mean[c] = finished.mean;
  args.invstd[c] = finished.invstd;
  if (finished.nonfinite) {
    ++args.nonfinite_batches[c];
  } else {
    write(args.running_mean, c, finished.running_mean);
    write(args.running_var, c, finished.running_var);
  }
  return finished.invstd;
}

// Results are a mean and an M2.
template <class S>
struct FinishTraining {
  BatchNormForward args;
  S* table;

  struct Known {
    double weight, bias;
    RunningStatistics running;
  };
  NF_DEVICE Known load(int64_t c) const {
    return {read(args.weight, c, 1), read(args.bias, c, 0), load_running(args, c)};
  }
  NF_DEVICE void prefetch(int64_t c) const {
    prefetch_entry(args.weight, c);
    prefetch_entry(args.bias, c);
    prefetch_entry(args.running_mean, c);
    prefetch_entry(args.running_var, c);
  }
  NF_DEVICE void operator()(int64_t c, const double (&results)[2], const Known& known) const {
    const double invstd = finish_statistics(args, c, {args.view.positions(), results[0], results[1]}, known.running);
    write_row(table, args.view.channels, c, forward_coefficients<S>({results[0], invstd, known.weight, known.bias}));
  }
};

// Results are the sums of GradSumsOp; without them the parameters' gradients are there already, of *args.count values,
// or statistics are constants, and nobody asks for these gradients.
template <class S, bool kFused>
struct FinishBackward {
  BatchNormBackward args;
  S* table;

  using Known = Normalization;
  NF_DEVICE Known load(int64_t c) const {
    return normalization_of(args, c, read(args.weight, c, 1), read(args.bias, c, 0));
  }
  NF_DEVICE void prefetch(int64_t) const {}  // GradSumsOp has loaded it
  NF_DEVICE void operator()(int64_t c, const double (&sums)[2], const Known& n) const {
    const double grad_weight = grad_weight_of<S>(n, sums[0], sums[1]);
    write_coefficients(c, n, args.view.positions(), grad_weight, sums[0]);
    write(args.grad_weight, c, grad_weight);
    write(args.grad_bias, c, sums[0]);
  }
  NF_DEVICE void operator()(int64_t c) const {
    if (args.count != nullptr)
      write_coefficients(c, load(c), *args.count, read(args.grad_weight, c, 0), read(args.grad_bias, c, 0));
    else
      write_coefficients(c, load(c), 1, 0, 0);
  }

 private:
  NF_DEVICE void write_coefficients(int64_t c, const Normalization& n, int64_t count, double grad_weight,
                                    double grad_bias) const {
    const int64_t channels = args.view.channels;
    const auto k = backward_coefficients<S>(n, count, grad_weight, grad_bias);
    table[Row::kScale * channels + c] = k.scale;
    table[Row::kPivot * channels + c] = k.pivot;
    table[Row::kSlope * channels + c] = k.slope;
    table[Row::kShift * channels + c] = k.shift;
    if constexpr (kFused) table[Row::kForwardShift * channels + c] = forward_coefficients<S>(n).shift;
  }
};

// Runs a function of the channel for every channel.
template <class F>
__global__ void __launch_bounds__(kThreads, kMinBlocks) each_channel(const F function, const int64_t channels) {
  allow_next_launch();
  const int64_t c = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (c < channels) function(c);
}

template <class F>
cudaError_t for_each_channel(const F& function, int64_t channels, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((channels + kThreads - 1) / kThreads);
  return launch(LaunchConfig{dim3(blocks), dim3(kThreads), stream}, each_channel<F>, function, channels);
}

// Coefficients from the running statistics, where they are there. These are written down too, if `first`.
template <class S>
NF_DEVICE ForwardCoefficients<S> inference_coefficients(const BatchNormForward& args, int64_t c, bool first) {
  const double weight = read(args.weight, c, 1), bias = read(args.bias, c, 0);
  if (!args.running_mean) return forward_coefficients<S>({args.mean[c], args.invstd[c], weight, bias});
  const double mean = read(args.running_mean, c, 0), invstd = invstd_of(read(args.running_var, c, 0), args.eps);
  if (first) {
    args.mean[c] = mean;
    args.invstd[c] = invstd;
  }
  return forward_coefficients<S>({mean, invstd, weight, bias});
}

template <class S>
struct PrepareInference {
  BatchNormForward args;
  S* table;

  NF_DEVICE void operator()(int64_t c) const {
    write_row(table, args.view.channels, c, inference_coefficients<S>(args, c, true));
  }
};

// The same by the blocks that apply them.
template <class T, bool kFused>
struct InferenceOp : NormalizeOp<T, kFused> {
  using S = typename NormalizeOp<T, kFused>::S;
  static constexpr bool kPrepares = true;

  BatchNormForward args;

  NF_DEVICE void prepare(int64_t c, bool first, S (&coefficients)[3]) const {
    write_row(coefficients, 1, 0, inference_coefficients<S>(args, c, first));
  }
};

struct ClearBits {
  uint8_t* bits;

  NF_DEVICE void operator()(int64_t byte) const { bits[byte] = 0; }
};

}  // namespace normfused::cuda
