// Batch norm: what is done per value, and what is done once for each channel.
#pragma once

#include "kernels/cuda/channel_stats.cuh"

namespace normfused::cuda {

// (x - pivot) * scale + shift
template <class T_, class Output_ = T_>
struct NormalizeOp {
  using T = T_;
  using Output = Output_;
  using S = compute_t<std::conditional_t<std::is_integral_v<T>, Output, T>>;
  static constexpr int kInputs = 1, kCoefficients = 3;

  const T* tensor;
  Output* output;
  const S* table;
  int64_t* counter;  // counted up by the first block, once all readers of the old value are done; or null

  NF_DEVICE const T* input(int) const { return tensor; }
  NF_DEVICE S operator()(const S (&x)[1], const S (&k)[3]) const { return (x[0] - k[0]) * k[1] + k[2]; }
  NF_DEVICE void before() const {
    if (counter != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*counter;
  }
};

// grad_output * scale + (x - pivot) * slope + shift
template <class T_>
struct GradInputOp {
  using T = T_;
  using Output = T;
  using S = compute_t<T>;
  static constexpr int kInputs = 2, kCoefficients = 4;

  const T* grad_output;
  const T* tensor;
  T* output;
  const S* table;

  NF_DEVICE const T* input(int k) const { return k == 0 ? grad_output : tensor; }
  NF_DEVICE S operator()(const S (&x)[2], const S (&k)[4]) const { return x[0] * k[1] + ((x[1] - k[0]) * k[2] + k[3]); }
  NF_DEVICE void before() const {}
};

// grad_output * scale: where the statistics are constants, x has no part in its gradient, be it infinite.
template <class T_>
struct ScaleOp {
  using T = T_;
  using Output = T;
  using S = compute_t<T>;
  static constexpr int kInputs = 1, kCoefficients = 1;

  const T* grad_output;
  T* output;
  const S* table;

  NF_DEVICE const T* input(int) const { return grad_output; }
  NF_DEVICE S operator()(const S (&x)[1], const S (&k)[1]) const { return x[0] * k[0]; }
  NF_DEVICE void before() const {}
};

// Sums of grad_output and of grad_output * (x - pivot), where pivot is the mean rounded to S.
template <class T_>
struct GradSumsOp {
  using T = T_;
  using S = compute_t<T>;
  using Sum = double;
  static constexpr int kInputs = 2, kSums = 2;
  static constexpr bool kRepairs = false;

  struct State {
    S pivot, sum, product;
  };

  const T* grad_output;
  const T* tensor;
  const double* mean;
  ChannelView view;

  NF_DEVICE const T* input(int k) const { return k == 0 ? grad_output : tensor; }
  static NF_DEVICE double empty(int) { return 0; }
  static NF_DEVICE double join(int, double a, double b) { return a + b; }
  NF_DEVICE State start(int64_t channel) const { return {static_cast<S>(mean[channel]), 0, 0}; }

  template <int n, bool kMasked>
  NF_DEVICE void accumulate(State& state, const S (&values)[2][n], uint32_t mask, bool) const {
    constexpr int kChains = n < 4 ? n : 4;
    S sum[kChains]{}, product[kChains]{};
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const bool counts = !kMasked || (mask >> i & 1);
      const S grad = counts ? values[0][i] : 0;
      sum[i % kChains] += grad;
      product[i % kChains] += counts ? grad * (values[1][i] - state.pivot) : 0;
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

template <class S>
NF_DEVICE void write_forward(const BatchNormForward& args, S* table, int64_t c, double mean, double invstd) {
  args.mean[c] = mean;
  args.invstd[c] = invstd;
  write_row(table, args.view.channels, c,
            forward_coefficients<S>(mean, invstd, read(args.weight, c, 1), read(args.bias, c, 0)));
}

// Results are a mean and an M2.
template <class S>
struct FinishTraining {
  BatchNormForward args;
  S* table;

  NF_DEVICE void operator()(int64_t c, const double (&results)[2]) const {
    const int64_t count = args.view.positions();
    const double variance = biased_variance({count, results[0], results[1]});
    if (args.running_mean) {
      // The counter is read only where the plan leaves its update to the next launch, see batch_norm.cu.
      const bool cumulative = args.momentum != args.momentum;
      const double factor = update_factor(args.momentum, cumulative ? *args.num_batches_tracked + 1 : 1);
      write(args.running_mean, c, running_average(read(args.running_mean, c, 0), results[0], factor));
      write(args.running_var, c, running_average(read(args.running_var, c, 0), unbiased(variance, count), factor));
    }
    write_forward(args, table, c, results[0], invstd_of(variance, args.eps));
  }
};

// Results are the sums of GradSumsOp; the table is GradInputOp's, whose second row is ScaleOp's.
template <class S>
struct FinishBackward {
  BatchNormBackward args;
  S* table;

  NF_DEVICE void operator()(int64_t c, const double (&sums)[2]) const {
    const int64_t channels = args.view.channels;
    const auto k = backward_coefficients<S>(args.mean[c], args.invstd[c], read(args.weight, c, 1),
                                            args.view.positions(), sums[0], sums[1]);
    table[c] = k.pivot;
    table[channels + c] = k.scale;
    table[2 * channels + c] = k.slope;
    table[3 * channels + c] = k.shift;
    write(args.grad_weight, c, k.grad_weight);
    write(args.grad_bias, c, k.grad_bias);
  }
};

// Runs a function of the channel for every channel.
template <class F>
__global__ void __launch_bounds__(kThreads, kMinBlocks) each_channel(const F function, const int64_t channels) {
  const int64_t c = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (c < channels) function(c);
}

template <class F>
cudaError_t for_each_channel(const F& function, int64_t channels, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((channels + kThreads - 1) / kThreads);
  return launch(LaunchConfig{dim3(blocks), dim3(kThreads), stream}, each_channel<F>, function, channels);
}

// Coefficients from the running statistics.
template <class S>
struct PrepareInference {
  BatchNormForward args;
  S* table;

  NF_DEVICE void operator()(int64_t c) const {
    write_forward(args, table, c, read(args.running_mean, c, 0), invstd_of(read(args.running_var, c, 0), args.eps));
  }
};

// ScaleOp's table.
template <class S>
struct PrepareScale {
  BatchNormBackward args;
  S* table;

  NF_DEVICE void operator()(int64_t c) const { table[c] = static_cast<S>(read(args.weight, c, 1) * args.invstd[c]); }
};

// NormalizeOp's table from a mean and a standard deviation.
template <class S>
struct PrepareStandardize {
  ChannelVector mean, std;
  int64_t channels;
  S* table;

  NF_DEVICE void operator()(int64_t c) const {
    write_row(table, channels, c, forward_coefficients<S>(read(mean, c, 0), 1 / read(std, c, 1), 1, 0));
  }
};

}  // namespace normfused::cuda
