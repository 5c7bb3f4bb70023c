// Batch norm: apply and reduce operations per element, and what is computed once per channel. The formulas are those of
// math.h. kFused: a residual, an activation or both follow the normalization.
#pragma once

#include "kernels/cuda/apply.cuh"
#include "kernels/cuda/channel_stats.cuh"
#include "kernels/cuda/elementary.cuh"

namespace normfused::cuda {

// --- activation and its mask

// Calls f once, with a piecewise linear activation, or with an Activation whose kind is a constant to the compiler. The
// branch on the kind is then taken once per vector and not per element.
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

// The mask's bits of n values at an offset that is a multiple of n; n divides 8.
template <int n>
NF_DEVICE uint32_t load_mask_bits(const uint8_t* mask, int64_t offset) {
  return mask[offset / 8] >> (offset % 8) & kAllValid<n>;
}

// Writes the mask's bits of the valid values: a whole byte, or single bits of a mask that was cleared before.
template <int n>
NF_DEVICE void store_mask_bits(uint8_t* mask, int64_t offset, uint32_t bits, uint32_t valid) {
  static_assert(n == 8 || n == 1);
  if constexpr (n == 8)
    mask[offset / 8] = static_cast<uint8_t>(bits & valid);
  else if (bits & valid)
    atomicOr(reinterpret_cast<unsigned*>(mask) + offset / 32, 1u << (offset % 32));
}

// --- per element

// Apply Op of forward: output = activation(z + residual) with z = (x - pivot) * scale + shift. Coefficients: pivot,
// scale, shift.
template <class T_, bool kFused = false>
struct NormalizeOp {
  using T = T_;
  using Output = T;
  using S = compute_t<T>;
  static constexpr int kInputs = kFused ? 2 : 1, kRequiredInputs = 1, kOutputs = 1, kCoefficients = 3;
  static constexpr bool kWritesMask = kFused, kPrepares = false;

  const T* tensor;
  Output* target;
  const S* table;
  int64_t* counter;   // incremented by the first block, after every reader of the old value has ended; may be null
  const T* residual;  // may be null
  Activation activation;
  uint8_t* mask;                    // receives whether the activation's input is positive; may be null
  uint8_t* mask_padding = nullptr;  // the bytes past the last bit, cleared by the first block; may be null

  NF_DEVICE const T* input(int k) const { return k == 0 ? tensor : residual; }
  NF_DEVICE Output* output(int) const { return target; }

  template <int n, class CoefficientsOf>
  NF_DEVICE void operator()(const S (&x)[kInputs][n], S (&y)[1][n], const CoefficientsOf& coefficients_of,
                            int64_t offset, uint32_t valid) const {
    uint32_t positive = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const auto& c = coefficients_of(i);
      y[0][i] = (x[0][i] - c.k[0]) * c.k[1] + c.k[2];
      if constexpr (kFused) {
        y[0][i] += x[1][i];
        positive |= static_cast<uint32_t>(!(y[0][i] <= 0)) << i;  // NaN counts as positive
      }
    }
    if constexpr (kFused) {
      if (mask != nullptr) store_mask_bits<n>(mask, offset, positive, valid);
      for_activation<S>(activation, [&](const auto& known) {
#pragma unroll
        for (int i = 0; i < n; ++i) y[0][i] = activated<elementary_t<T>, S>(known, y[0][i]);
      });
    }
  }
  NF_DEVICE void prologue() const {
    if (blockIdx.x != 0) return;
    if (counter != nullptr && threadIdx.x == 0) ++*counter;
    if (kFused && mask_padding != nullptr && threadIdx.x < kMaskPadding) mask_padding[threadIdx.x] = 0;
  }
};

// Computes z, the normalized value before the residual is added, for n values. With `from_output` the values are
// forward's output, and are replaced by z: the activation is inverted. Otherwise they are its input, and
// normalize(i, x) gives z.
template <int n, class S, class Normalize>
NF_DEVICE void recover_z(bool from_output, const Activation& activation, S (&value)[n], S (&z)[n],
                         const Normalize& normalize) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (from_output) value[i] = deactivated(piecewise_linear<S>(activation), value[i]);
    z[i] = from_output ? value[i] : normalize(i, value[i]);
  }
}

// The mask's bits of n values, if forward saved a mask.
struct SavedMask {
  bool present;
  uint32_t bits;
};

// Replaces the gradients of n outputs by those of z, the gradients that reach the normalization. With a mask neither z
// nor the residual is used.
template <class E, int n, class S>
NF_DEVICE void activation_backward(const Activation& activation, S (&grad)[n], const S (&z)[n], const S (&residual)[n],
                                   const SavedMask& mask) {
  if (mask.present) {
    const PiecewiseLinear<S> pieces = piecewise_linear<S>(activation);
#pragma unroll
    for (int i = 0; i < n; ++i) grad[i] = mask.bits >> i & 1 ? grad[i] : sloped(pieces, grad[i]);
    return;
  }
  for_activation<S>(activation, [&](const auto& known) {
#pragma unroll
    for (int i = 0; i < n; ++i) grad[i] = activation_gradient<E, S>(known, z[i] + residual[i], grad[i]);
  });
}

// Indices of the coefficients of backward. The last, the shift of forward, is present only if z is needed.
struct GradCoefficient {
  static constexpr int kScale = 0, kPivot = 1, kSlope = 2, kShift = 3, kForwardShift = 4;
};

// Apply Op of backward: grad_input = g * scale + (x - pivot) * slope + shift and grad_residual = g, where g is the
// gradient of z. If the statistics are constants, grad_input = g * scale, and x does not contribute even if infinite.
template <class T_, bool kFused>
struct GradInputOp {
  using T = T_;
  using Output = T;
  using S = compute_t<T>;
  using C = GradCoefficient;
  static constexpr int kInputs = kFused ? 3 : 2, kRequiredInputs = kFused ? 1 : 2, kOutputs = kFused ? 2 : 1;
  static constexpr int kCoefficients = kFused ? 5 : 4;
  static constexpr bool kWritesMask = false, kPrepares = false;

  const T* grad_output;
  const T* tensor;  // kFused: may be null if neither the statistics nor the activation need it
  T* grad_input;
  const S* table;
  const T* residual;  // may be null
  T* grad_residual;   // may be null
  Activation activation;
  const uint8_t* mask;  // may be null
  bool training, from_output;

  NF_DEVICE const T* input(int k) const { return k == 0 ? grad_output : k == 1 ? tensor : residual; }
  NF_DEVICE T* output(int k) const { return k == 0 ? grad_input : grad_residual; }

  template <int n, class CoefficientsOf>
  NF_DEVICE void operator()(const S (&x)[kInputs][n], S (&y)[kOutputs][n], const CoefficientsOf& coefficients_of,
                            int64_t offset, uint32_t) const {
    if constexpr (!kFused) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const auto& c = coefficients_of(i);
        y[0][i] = x[0][i] * c.k[C::kScale] + ((x[1][i] - c.k[C::kPivot]) * c.k[C::kSlope] + c.k[C::kShift]);
      }
    } else {
      S value[n], z[n];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        y[1][i] = x[0][i];
        value[i] = x[1][i];
      }
      recover_z(from_output, activation, value, z, [&](int i, S v) {
        const auto& c = coefficients_of(i);
        return (v - c.k[C::kPivot]) * c.k[C::kScale] + c.k[C::kForwardShift];
      });
      activation_backward<elementary_t<T>>(activation, y[1], z, x[2],
                                           {mask != nullptr, mask != nullptr ? load_mask_bits<n>(mask, offset) : 0});
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const auto& c = coefficients_of(i);
        const S through_statistics = (value[i] - c.k[C::kPivot]) * c.k[C::kSlope] + c.k[C::kShift];
        y[0][i] = y[1][i] * c.k[C::kScale] + (training ? through_statistics : 0);
      }
    }
  }
  NF_DEVICE void prologue() const {}
};

// Apply Op of backward if the statistics are constants and nothing follows the normalization: grad_output * scale.
template <class T_>
struct ScaleOp {
  using T = T_;
  using Output = T;
  using S = compute_t<T>;
  static constexpr int kInputs = 1, kRequiredInputs = 1, kOutputs = 1, kCoefficients = 1;
  static constexpr bool kWritesMask = false, kPrepares = false;

  const T* grad_output;
  T* grad_input;
  const S* table;

  NF_DEVICE const T* input(int) const { return grad_output; }
  NF_DEVICE T* output(int) const { return grad_input; }
  template <int n, class CoefficientsOf>
  NF_DEVICE void operator()(const S (&x)[1][n], S (&y)[1][n], const CoefficientsOf& coefficients_of, int64_t,
                            uint32_t) const {
#pragma unroll
    for (int i = 0; i < n; ++i) y[0][i] = x[0][i] * coefficients_of(i).k[0];
  }
  NF_DEVICE void prologue() const {}
};

// Reduce Op of backward: the sums of g and of g * (x - pivot), where g is the gradient of z and the pivot is the mean
// rounded to S.
template <class T_, bool kFused>
struct GradSumsOp {
  using T = T_;
  using S = compute_t<T>;
  using Sum = double;
  static constexpr int kInputs = kFused ? 3 : 2, kRequiredInputs = 2, kSums = 2;
  static constexpr bool kRecomputes = false, kStartsFromMemory = true;

  struct Plain {
    S pivot, sum, product;
  };
  struct Fused : Plain {
    S scale, shift;  // z = (x - pivot) * scale + shift
  };
  using State = std::conditional_t<kFused, Fused, Plain>;

  BatchNormBackward args;
  ChannelView view = args.view;

  NF_DEVICE const T* input(int k) const {
    return static_cast<const T*>(k == 0 ? args.grad_output : k == 1 ? args.input : args.residual);
  }
  static NF_DEVICE double identity(int) { return 0; }
  static NF_DEVICE double merge(int, double a, double b) { return a + b; }
  NF_DEVICE State start(int64_t channel) const {
    return state_of(normalization_of(args, channel, read(args.weight, channel, 1), read(args.bias, channel, 0)));
  }
  static NF_DEVICE State state_of(const Normalization& normalization) {
    const auto k = forward_coefficients<S>(normalization);
    State state{};
    state.pivot = k.pivot;
    if constexpr (kFused) {
      state.scale = k.scale;
      state.shift = k.shift;
    }
    return state;
  }
  template <int n>
  NF_DEVICE uint32_t mask_bits(int64_t offset) const {
    return kFused && args.mask != nullptr ? load_mask_bits<n>(args.mask, offset) : 0;
  }

  template <int n, bool kMasked>
  NF_DEVICE void accumulate(State& state, const S (&values)[kInputs][n], uint32_t valid, uint32_t mask_bits,
                            bool) const {
    constexpr int kChains = n < 4 ? n : 4;  // independent chains of additions hide their latency
    S grad[n], value[n];
#pragma unroll
    for (int i = 0; i < n; ++i) {
      grad[i] = values[0][i];
      value[i] = values[1][i];
    }
    if constexpr (kFused) {
      S z[n];
      recover_z(args.from_output, args.activation, value, z,
                [&](int, S v) { return (v - state.pivot) * state.scale + state.shift; });
      activation_backward<elementary_t<T>>(args.activation, grad, z, values[2], {args.mask != nullptr, mask_bits});
    }
    S sum[kChains]{}, product[kChains]{};
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const bool is_valid = !kMasked || (valid >> i & 1);
      sum[i % kChains] += is_valid ? grad[i] : 0;
      product[i % kChains] += is_valid ? grad[i] * (value[i] - state.pivot) : 0;
    }
#pragma unroll
    for (int i = 1; i < kChains; ++i) {
      sum[0] += sum[i];
      product[0] += product[i];
    }
    state.sum += sum[0];
    state.product += product[0];
  }

  NF_DEVICE void fold(const State& state, int64_t, int64_t, Sum (&sums)[2]) const {
    sums[0] = static_cast<double>(state.sum);
    sums[1] = static_cast<double>(state.product);
  }
  NF_DEVICE void finalize(int64_t, Sum (&)[2]) const {}
};

// --- per channel. A table of coefficients is (kCoefficients of the apply Op, channels).

template <class S>
NF_DEVICE void store_coefficients(S* table, int64_t channels, int64_t c, const ForwardCoefficients<S>& k) {
  table[c] = k.pivot;
  table[channels + c] = k.scale;
  table[2 * channels + c] = k.shift;
}

// The inputs of the update of the running statistics. They are loaded before anything is stored, so that the loads of a
// channel overlap.
struct RunningStatistics {
  double mean, var;
  int64_t batches;  // including this one; read only for a cumulative average, whose counter a later launch increments
};
NF_DEVICE RunningStatistics load_running(const BatchStatistics& args, int64_t c) {
  const bool cumulative = args.momentum != args.momentum && args.num_batches_tracked != nullptr;
  return {read(args.running_mean, c, 0), read(args.running_var, c, 0), cumulative ? *args.num_batches_tracked + 1 : 1};
}

// Writes a channel's mean and invstd, and updates its running statistics or its count of nonfinite batches. Returns
// invstd.
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

// Finish of training: statistics, running statistics and the coefficients of NormalizeOp from mean and M2.
template <class S>
struct FinishTraining {
  BatchNormForward args;
  S* table;

  struct Preloaded {
    double weight, bias;
    RunningStatistics running;
  };
  NF_DEVICE Preloaded preload(int64_t c) const {
    return {read(args.weight, c, 1), read(args.bias, c, 0), load_running(args, c)};
  }
  NF_DEVICE void prefetch(int64_t c) const {
    prefetch_entry(args.weight, c);
    prefetch_entry(args.bias, c);
    prefetch_entry(args.running_mean, c);
    prefetch_entry(args.running_var, c);
  }
  NF_DEVICE void operator()(int64_t c, const double (&results)[2], const Preloaded& preloaded) const {
    const double invstd =
        finish_statistics(args, c, {args.view.positions(), results[0], results[1]}, preloaded.running);
    store_coefficients(table, args.view.channels, c,
                       forward_coefficients<S>({results[0], invstd, preloaded.weight, preloaded.bias}));
  }
};

// Finish of backward: parameter gradients and the coefficients of GradInputOp from the sums of GradSumsOp.
//
// It is also a function of the channel alone, for a backward without a reduction: the parameter gradients are already
// present, as sums over *args.count values, or the statistics are constants and no parameter gradient is requested.
template <class S, bool kFused>
struct FinishBackward {
  BatchNormBackward args;
  S* table;

  using Preloaded = Normalization;
  NF_DEVICE Preloaded preload(int64_t c) const {
    return normalization_of(args, c, read(args.weight, c, 1), read(args.bias, c, 0));
  }
  NF_DEVICE void prefetch(int64_t) const {}  // GradSumsOp::start() has loaded it
  NF_DEVICE void operator()(int64_t c, const double (&sums)[2], const Normalization& n) const {
    const double grad_weight = grad_weight_of<S>(n, sums[0], sums[1]);
    write_coefficients(c, n, args.view.positions(), grad_weight, sums[0]);
    write(args.grad_weight, c, grad_weight);
    write(args.grad_bias, c, sums[0]);
  }
  NF_DEVICE void operator()(int64_t c) const {
    if (args.count != nullptr)
      write_coefficients(c, preload(c), *args.count, read(args.grad_weight, c, 0), read(args.grad_bias, c, 0));
    else
      write_coefficients(c, preload(c), 1, 0, 0);
  }

 private:
  NF_DEVICE void write_coefficients(int64_t c, const Normalization& n, int64_t count, double grad_weight,
                                    double grad_bias) const {
    using C = GradCoefficient;
    const int64_t channels = args.view.statistics();
    const auto k = backward_coefficients<S>(n, count, grad_weight, grad_bias);
    table[C::kScale * channels + c] = k.scale;
    table[C::kPivot * channels + c] = k.pivot;
    table[C::kSlope * channels + c] = k.slope;
    table[C::kShift * channels + c] = k.shift;
    if constexpr (kFused) table[C::kForwardShift * channels + c] = forward_coefficients<S>(n).shift;
  }
};

// Kernel: calls function(i) for every i < count, one per thread.
template <class F>
__global__ void __launch_bounds__(kThreads, kMinBlocks) each_channel(const F function, const int64_t count) {
  allow_next_launch();
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < count) function(i);
}

template <class F>
cudaError_t for_each_channel(const F& function, int64_t count, cudaStream_t stream) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return launch(LaunchConfig{dim3(extent(blocks)), dim3(kThreads), stream}, each_channel<F>, function, count);
}

// The coefficients of inference: from the running statistics, which are then also written to mean and invstd by the
// owner; without running statistics from mean and invstd.
template <class S>
NF_DEVICE ForwardCoefficients<S> inference_coefficients(const BatchNormForward& args, int64_t c, bool is_owner) {
  const double weight = read(args.weight, c, 1), bias = read(args.bias, c, 0);
  if (!args.running_mean) return forward_coefficients<S>({args.mean[c], args.invstd[c], weight, bias});
  const double mean = read(args.running_mean, c, 0), invstd = invstd_of(read(args.running_var, c, 0), args.eps);
  if (is_owner) {
    args.mean[c] = mean;
    args.invstd[c] = invstd;
  }
  return forward_coefficients<S>({mean, invstd, weight, bias});
}

// Computes a table of the coefficients of inference, in a separate launch.
template <class S>
struct PrepareInference {
  BatchNormForward args;
  S* table;

  NF_DEVICE void operator()(int64_t c) const {
    store_coefficients(table, args.view.channels, c, inference_coefficients<S>(args, c, true));
  }
};

// Apply Op of inference in one launch: every block computes the coefficients of its channels.
template <class T, bool kFused>
struct InferenceOp : NormalizeOp<T, kFused> {
  using S = typename NormalizeOp<T, kFused>::S;
  static constexpr bool kPrepares = true;

  BatchNormForward args;

  NF_DEVICE void prepare(int64_t c, bool is_owner, S (&coefficients)[3]) const {
    store_coefficients(coefficients, 1, 0, inference_coefficients<S>(args, c, is_owner));
  }
};

// Clears byte i of a mask.
struct ClearMask {
  uint8_t* mask;

  NF_DEVICE void operator()(int64_t byte) const { mask[byte] = 0; }
};

}  // namespace normfused::cuda
