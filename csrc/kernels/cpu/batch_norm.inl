// Batch norm: what is done per value, and the drivers that put reduction, per-channel math and application together.

// (x - pivot) * scale + shift
template <class T_>
struct NormalizeOp {
  using T = T_;
  using V = Block<compute_t<T>, T>;
  static constexpr int64_t kCoefficients = 3;

  const T* input;
  T* output;

  template <class Width>
  NF_INLINE V operator()(int64_t offset, Width width, const Coefficients<NormalizeOp>& c) const {
    return (load_block<V>(input + offset, width) - c.k[0]) * c.k[1] + c.k[2];
  }
};

// Sums of grad_output and of grad_output * (x - pivot), where pivot is the mean rounded to S.
template <class T>
struct GradSumsOp {
  using S = compute_t<T>;
  using V = Block<S, T>;
  static constexpr int64_t kSums = 2;
  static constexpr bool kSeeksPivot = false;

  const T* grad_output;
  const T* input;
  const double* mean;

  static NF_INLINE S empty(int64_t) { return 0; }
  template <class V>
  static NF_INLINE V join(int64_t, V a, V b) {
    return a + b;
  }

  template <class Width>
  NF_INLINE void accumulate(Sums<GradSumsOp>& sums, int64_t offset, Width width, const V& pivot) const {
    const V grad = load_block<V>(grad_output + offset, width);
    const V deviation = load_block(input + offset, width, pivot) - pivot;
    sums.k[0] = sums.k[0] + grad;
    sums.k[1] = sums.k[1] + grad * deviation;
  }

  NF_INLINE void prefetch(int64_t offset, int64_t n) const {
    prefetch_row(input + offset, n);
    prefetch_row(grad_output + offset, n);
  }
  NF_INLINE S first_pivot(int64_t c, int64_t) const { return static_cast<S>(mean[c]); }

  NF_INLINE Lanes<GradSumsOp> results_of(Vec<double>, int64_t, const Lanes<GradSumsOp>& sums) const { return sums; }
  NF_INLINE Lanes<GradSumsOp> merge(int64_t, const Lanes<GradSumsOp>& a, int64_t, const Lanes<GradSumsOp>& b) const {
    return {a.k[0] + b.k[0], a.k[1] + b.k[1]};
  }
  NF_INLINE Vec<double> next_pivot(Vec<double> pivot, const Lanes<GradSumsOp>&) const { return pivot; }
};

// grad_output * scale + (x - pivot) * slope + shift
template <class T_>
struct GradInputOp {
  using T = T_;
  using V = Block<compute_t<T>, T>;
  static constexpr int64_t kCoefficients = 4;

  const T* grad_output;
  const T* input;
  T* output;

  template <class Width>
  NF_INLINE V operator()(int64_t offset, Width width, const Coefficients<GradInputOp>& c) const {
    const V deviation = load_block<V>(input + offset, width) - c.k[0];
    return load_block<V>(grad_output + offset, width) * c.k[1] + (deviation * c.k[2] + c.k[3]);
  }
};

// grad_output * scale: where the statistics are constants, x has no part in its gradient, be it infinite.
template <class T_>
struct ScaleOp {
  using T = T_;
  using V = Block<compute_t<T>, T>;
  static constexpr int64_t kCoefficients = 1;

  const T* input;
  T* output;

  template <class Width>
  NF_INLINE V operator()(int64_t offset, Width width, const Coefficients<ScaleOp>& c) const {
    return load_block<V>(input + offset, width) * c.k[0];
  }
};

// What follows is done per channel: statistics turned into coefficients, parameters' gradients and new running buffers.
// A table of coefficients has one row for each of the Op's, of all channels.

// NormalizeOp's, from args.mean and args.invstd.
template <class S>
void forward_table(const BatchNormForward& args, S* table, int64_t c0, int64_t n) {
  const int64_t channels = args.view.channels;
  double weight[kEntries], bias[kEntries];
  read(args.weight, c0, n, 1, weight);
  read(args.bias, c0, n, 0, bias);
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const auto k = forward_coefficients<S>(args.mean[c0 + i], args.invstd[c0 + i], weight[i], bias[i]);
    table[c0 + i] = k.pivot;
    table[channels + c0 + i] = k.scale;
    table[2 * channels + c0 + i] = k.shift;
  }
}

// Results are a mean and an M2. `factor` is the share of this batch in the running statistics.
template <class S>
void finish_training(const BatchNormForward& args, const Results& results, double factor, S* table, int64_t c0,
                     int64_t n) {
  const int64_t count = args.view.positions();
  double running_mean[kEntries], running_var[kEntries];
  read(args.running_mean, c0, n, 0, running_mean);
  read(args.running_var, c0, n, 0, running_var);
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const double mean = results(0, c0 + i);
    const double variance = biased_variance({count, mean, results(1, c0 + i)});
    args.mean[c0 + i] = mean;
    args.invstd[c0 + i] = invstd_of(variance, args.eps);
    running_mean[i] = running_average(running_mean[i], mean, factor);
    running_var[i] = running_average(running_var[i], unbiased(variance, count), factor);
  }
  write(args.running_mean, c0, n, running_mean);
  write(args.running_var, c0, n, running_var);
  forward_table(args, table, c0, n);
}

// Results are the sums of GradSumsOp; the table is GradInputOp's.
template <class S>
void finish_backward(const BatchNormBackward& args, const Results& results, S* table, int64_t c0, int64_t n) {
  const int64_t channels = args.view.channels, count = args.view.positions();
  double weight[kEntries], grad_weight[kEntries], grad_bias[kEntries];
  read(args.weight, c0, n, 1, weight);
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const auto k = backward_coefficients<S>(args.mean[c0 + i], args.invstd[c0 + i], weight[i], count,
                                            results(0, c0 + i), results(1, c0 + i));
    table[c0 + i] = k.pivot;
    table[channels + c0 + i] = k.scale;
    table[2 * channels + c0 + i] = k.slope;
    table[3 * channels + c0 + i] = k.shift;
    grad_weight[i] = k.grad_weight;
    grad_bias[i] = k.grad_bias;
  }
  write(args.grad_weight, c0, n, grad_weight);
  write(args.grad_bias, c0, n, grad_bias);
}

template <class T>
void batch_norm_training(const BatchNormForward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  using Reduce = MomentsOp<T, false>;
  const ChannelView& view = args.view;
  const Reduce moments{static_cast<const T*>(args.input)};
  const NormalizeOp<T> normalize{moments.input, static_cast<T*>(args.output)};
  const Plan plan = plan_reduction(view, sizeof(T), 1);
  const bool streaming = worth_streaming(normalize, view, plan);
  const Workspace workspace(plan.position_units * Reduce::kSums * view.channels, 3 * view.channels * sizeof(S));
  const Results results{workspace.results, view.channels};
  S* const table = static_cast<S*>(workspace.table);
  const double factor = update_factor(args.momentum, args.num_batches_tracked ? ++*args.num_batches_tracked : 1);

  sweep(
      moments, view, plan, parallel, results,
      [&](int64_t c0, int64_t c1) {
        repair_moments(moments, view, results, c0, c1);
        for_entries(c0, c1, [&](int64_t c, int64_t n) { finish_training(args, results, factor, table, c, n); });
      },
      [&](const Unit& unit) { apply(normalize, view, unit, table, streaming); });
}

template <class T>
void batch_norm_inference(const BatchNormForward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  const ChannelView& view = args.view;
  const NormalizeOp<T> normalize{static_cast<const T*>(args.input), static_cast<T*>(args.output)};
  const Plan plan = plan_elementwise(view, sizeof(T), 2);
  const bool streaming = worth_streaming(normalize, view, plan);
  const Workspace workspace(0, 3 * view.channels * sizeof(S));
  S* const table = static_cast<S*>(workspace.table);
  for_entries(0, view.channels, [&](int64_t c0, int64_t n) {
    read(args.running_mean, c0, n, 0, args.mean + c0);
    read(args.running_var, c0, n, 0, args.invstd + c0);
    for (int64_t c = c0; c < c0 + n; ++c) args.invstd[c] = invstd_of(args.invstd[c], args.eps);
    forward_table(args, table, c0, n);
  });
  parallel(plan.units(), grain(plan),
           [&](int64_t index) { apply(normalize, view, unit_of(plan, view, index), table, streaming); });
}

template <class T>
void batch_norm_backward(const BatchNormBackward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  using Reduce = GradSumsOp<T>;
  const ChannelView& view = args.view;
  const Reduce sums{static_cast<const T*>(args.grad_output), static_cast<const T*>(args.input), args.mean};
  T* const grad_input = static_cast<T*>(args.grad_input);
  const GradInputOp<T> through_statistics{sums.grad_output, sums.input, grad_input};
  const ScaleOp<T> past_statistics{sums.grad_output, grad_input};

  if (!args.training && !args.grad_weight && !args.grad_bias) {
    const Plan plan = plan_elementwise(view, sizeof(T), 2);
    const bool streaming = worth_streaming(past_statistics, view, plan);
    const Workspace workspace(0, view.channels * sizeof(S));
    S* const scale = static_cast<S*>(workspace.table);
    for_entries(0, view.channels, [&](int64_t c0, int64_t n) {
      double weight[kEntries];
      read(args.weight, c0, n, 1, weight);
      for (int64_t i = 0; i < n; ++i) scale[c0 + i] = static_cast<S>(weight[i] * args.invstd[c0 + i]);
    });
    parallel(plan.units(), grain(plan),
             [&](int64_t index) { apply(past_statistics, view, unit_of(plan, view, index), scale, streaming); });
    return;
  }

  const Plan plan = plan_reduction(view, sizeof(T), 2);
  const bool streaming = worth_streaming(through_statistics, view, plan);
  const Workspace workspace(plan.position_units * Reduce::kSums * view.channels, 4 * view.channels * sizeof(S));
  const Results results{workspace.results, view.channels};
  S* const table = static_cast<S*>(workspace.table);
  S* const scale = table + view.channels;

  sweep(
      sums, view, plan, parallel, results,
      [&](int64_t c0, int64_t c1) {
        for_entries(c0, c1, [&](int64_t c, int64_t n) { finish_backward(args, results, table, c, n); });
      },
      [&](const Unit& unit) {
        if (grad_input == nullptr) return;
        if (args.training)
          apply(through_statistics, view, unit, table, streaming);
        else
          apply(past_statistics, view, unit, scale, streaming);
      });
}
