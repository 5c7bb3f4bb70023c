// Batch norm: what is done per value, and the drivers that put reduction, per-channel math and application together.

// (x - pivot) * scale + shift
template <class T_>
struct NormalizeOp {
  using T = T_;
  using S = compute_t<T>;
  static constexpr int64_t kCoefficients = 3;

  const T* input;
  T* output;

  template <class Width>
  NF_INLINE Vec<S> operator()(int64_t offset, Width width, const Coefficients<NormalizeOp>& c) const {
    return (load<S>(input + offset, width) - c.k[0]) * c.k[1] + c.k[2];
  }
};

// Sums of grad_output and of grad_output * (x - pivot), where pivot is the mean rounded to S.
template <class T>
struct GradSumsOp {
  using S = compute_t<T>;
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
  NF_INLINE void accumulate(Sums<GradSumsOp>& sums, int64_t offset, Width width, Vec<S> pivot) const {
    const Vec<S> grad = load<S>(grad_output + offset, width, Vec<S>{});
    const Vec<S> deviation = load<S>(input + offset, width, pivot) - pivot;
    sums.k[0] += grad;
    sums.k[1] += grad * deviation;
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
  using S = compute_t<T>;
  static constexpr int64_t kCoefficients = 4;

  const T* grad_output;
  const T* input;
  T* output;

  template <class Width>
  NF_INLINE Vec<S> operator()(int64_t offset, Width width, const Coefficients<GradInputOp>& c) const {
    const Vec<S> deviation = load<S>(input + offset, width) - c.k[0];
    return load<S>(grad_output + offset, width) * c.k[1] + (deviation * c.k[2] + c.k[3]);
  }
};

// grad_output * scale: where the statistics are constants, x has no part in its gradient, be it infinite.
template <class T_>
struct ScaleOp {
  using T = T_;
  using S = compute_t<T>;
  static constexpr int64_t kCoefficients = 1;

  const T* input;
  T* output;

  template <class Width>
  NF_INLINE Vec<S> operator()(int64_t offset, Width width, const Coefficients<ScaleOp>& c) const {
    return load<S>(input + offset, width) * c.k[0];
  }
};

// Writes channel c's entries of the table that NormalizeOp applies.
template <class S>
NF_FN void set_forward_coefficients(const BatchNormForward& args, S* table, int64_t c) {
  const double weight = args.weight ? get(args.weight, c) : 1;
  const double bias = args.bias ? get(args.bias, c) : 0;
  const auto k = forward_coefficients<S>(args.mean[c], args.invstd[c], weight, bias);
  table[c] = k.pivot;
  table[args.view.channels + c] = k.scale;
  table[2 * args.view.channels + c] = k.shift;
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
        for (int64_t c = c0; c < c1; ++c) {
          const double mean = results(0, c);
          const double variance = biased_variance({view.positions(), mean, results(1, c)});
          args.mean[c] = mean;
          args.invstd[c] = invstd_of(variance, args.eps);
          set_forward_coefficients(args, table, c);
          if (args.running_mean) set(args.running_mean, c, running_average(get(args.running_mean, c), mean, factor));
          if (args.running_var)
            set(args.running_var, c,
                running_average(get(args.running_var, c), unbiased(variance, view.positions()), factor));
        }
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
  for (int64_t c = 0; c < view.channels; ++c) {
    args.mean[c] = get(args.running_mean, c);
    args.invstd[c] = invstd_of(get(args.running_var, c), args.eps);
    set_forward_coefficients(args, table, c);
  }
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
    for (int64_t c = 0; c < view.channels; ++c)
      scale[c] = static_cast<S>((args.weight ? get(args.weight, c) : 1) * args.invstd[c]);
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
        for (int64_t c = c0; c < c1; ++c) {
          const double weight = args.weight ? get(args.weight, c) : 1;
          const auto k = backward_coefficients<S>(args.mean[c], args.invstd[c], weight, view.positions(), results(0, c),
                                                  results(1, c));
          table[c] = k.pivot;
          scale[c] = k.scale;
          table[2 * view.channels + c] = k.slope;
          table[3 * view.channels + c] = k.shift;
          if (args.grad_weight) set(args.grad_weight, c, k.grad_weight);
          if (args.grad_bias) set(args.grad_bias, c, k.grad_bias);
        }
      },
      [&](const Unit& unit) {
        if (grad_input == nullptr) return;
        if (args.training)
          apply(through_statistics, view, unit, table, streaming);
        else
          apply(past_statistics, view, unit, scale, streaming);
      });
}
