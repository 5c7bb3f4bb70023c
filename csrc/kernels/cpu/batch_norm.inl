// Batch norm: what is done per value, and the drivers that put reduction, per-channel math and application together.

// What takes exponentials is called: inlined, its registers would be missing from every loop.
template <class S>
NF_NOINLINE Vec<S> transcendental(const Activation& activation, Vec<S> z) {
  return normfused::activated<Elementary, S>(activation, z);
}
template <class S>
NF_NOINLINE Vec<S> transcendental_gradient(const Activation& activation, Vec<S> z, Vec<S> grad) {
  return activation_gradient<Elementary, S>(activation, z, grad);
}

// An activation of blocks of S.
template <class S>
struct Activate {
  Activation activation;
  PiecewiseLinear<S> pieces = piecewise_linear<S>(activation);
  static constexpr Activation kHardswish{ActivationKind::kHardswish};

  template <class T>
  NF_INLINE Block<S, T> operator()(const Block<S, T>& z) const {
    return Block<S, T>::each([&](int64_t i) {
      if (activation.is_piecewise_linear()) return normfused::activated<Elementary, S>(pieces, z.part[i]);
      if (activation.kind == kHardswish.kind) return normfused::activated<Elementary, S>(kHardswish, z.part[i]);
      return transcendental<S>(activation, z.part[i]);
    });
  }
  template <class T>
  NF_INLINE Block<S, T> gradient(const Block<S, T>& z, const Block<S, T>& grad) const {
    return Block<S, T>::each([&](int64_t i) {
      if (activation.is_piecewise_linear()) return activation_gradient<Elementary, S>(pieces, z.part[i], grad.part[i]);
      if (activation.kind == kHardswish.kind)
        return activation_gradient<Elementary, S>(kHardswish, z.part[i], grad.part[i]);
      return transcendental_gradient<S>(activation, z.part[i], grad.part[i]);
    });
  }
};

// z = (x - pivot) * scale + shift. Fused: z + residual, activated; the residual may be null.
template <class T_, bool kFused>
struct NormalizeOp {
  using T = T_;
  using V = Block<compute_t<T>, T>;
  static constexpr int64_t kCoefficients = 3;

  const T* input;
  T* output;
  const T* residual;
  Activate<compute_t<T>> activate;
  uint8_t* mask;

  NF_INLINE bool outputs_are_aligned_alike() const { return true; }

  template <class Width, class Put>
  NF_INLINE void operator()(int64_t offset, Width width, const Coefficients<NormalizeOp>& c, const Put& put) const {
    V z = (load_block<V>(input + offset, width) - c.k[0]) * c.k[1] + c.k[2];
    if constexpr (kFused) {
      if (residual != nullptr) z = z + load_block<V>(residual + offset, width);
      if (mask != nullptr) store_bits(mask, offset, positive_bits(z), values_in<V>(width));
      z = activate(z);
    }
    put(output + offset, z, width);
  }
};

// What backward reads: x, and the gradient of z from that of the output.
template <class T, bool kFused>
struct Gradient {
  using S = compute_t<T>;
  using V = Block<S, T>;

  const T* grad_output;
  const T* input;
  const T* residual;
  Activate<S> activate;
  const uint8_t* mask;
  bool from_output;

  // From the output it is z that stands for x.
  template <class Width>
  NF_INLINE V value(int64_t offset, Width width, const V& fill = V{}) const {
    const V x = load_block(input + offset, width, fill);
    if (!kFused || !from_output) return x;
    return V::each([&](int64_t i) { return deactivated(activate.pieces, x.part[i]); });
  }
  NF_INLINE V normalized(const V& x, const V& pivot, const V& scale, const V& shift) const {
    return from_output ? x : (x - pivot) * scale + shift;
  }

  // normalize() is z before the residual; it is called where the activation's gradient depends on it.
  template <class Width, class F>
  NF_INLINE V operator()(int64_t offset, Width width, const F& normalize) const {
    const V grad = load_block<V>(grad_output + offset, width);
    if constexpr (!kFused) return grad;
    if (mask != nullptr) {
      const V below = V::each([&](int64_t i) { return sloped(activate.pieces, grad.part[i]); });
      return choose_by_bits(mask, offset, grad, below);
    }
    V z = normalize();
    if (residual != nullptr) z = z + load_block<V>(residual + offset, width);
    return activate.gradient(z, grad);
  }

  NF_INLINE void prefetch(int64_t offset, int64_t n) const {
    prefetch_row(input + offset, n);
    prefetch_row(grad_output + offset, n);
    if (kFused && residual != nullptr) prefetch_row(residual + offset, n);
  }
};

// Rows of the table of coefficients in backward. The last, forward's shift, is there only where z is needed.
struct Row {
  static constexpr int64_t kScale = 0, kPivot = 1, kSlope = 2, kShift = 3, kForwardShift = 4;
};
template <bool kFused>
inline constexpr int64_t kRows = kFused ? 5 : 4;

// Sums of g and of g * (x - pivot), where g is the gradient of z and pivot is the mean rounded to S.
template <class T, bool kFused>
struct GradSumsOp {
  using S = compute_t<T>;
  using V = Block<S, T>;
  static constexpr int64_t kSums = 2, kCoefficients = kFused ? 3 : 1;
  static constexpr bool kSeeksPivot = false;

  Gradient<T, kFused> gradient;
  const double* mean;
  const S* table;
  int64_t channels;

  static NF_INLINE S empty(int64_t) { return 0; }
  template <class V>
  static NF_INLINE V join(int64_t, V a, V b) {
    return a + b;
  }

  template <class Width>
  NF_INLINE void accumulate(Sums<GradSumsOp>& sums, int64_t offset, Width width,
                            const Coefficients<GradSumsOp>& c) const {
    const V x = gradient.value(offset, width, c.k[0]);
    const V deviation = x - c.k[0];
    const V grad = gradient(offset, width, [&]() __attribute__((always_inline)) {
      return gradient.normalized(x, c.k[0], c.k[kCoefficients / 2], c.k[kCoefficients - 1]);
    });
    sums.k[0] = sums.k[0] + grad;
    sums.k[1] = sums.k[1] + grad * deviation;
  }

  NF_INLINE void prefetch(int64_t offset, int64_t n) const { gradient.prefetch(offset, n); }
  NF_INLINE S coefficient(int64_t k, int64_t c, int64_t) const {
    if constexpr (!kFused) return static_cast<S>(mean[c]);
    return table[(k == 0 ? Row::kPivot : k == 1 ? Row::kScale : Row::kForwardShift) * channels + c];
  }

  NF_INLINE Lanes<GradSumsOp> results_of(Vec<double>, int64_t, const Lanes<GradSumsOp>& sums) const { return sums; }
  NF_INLINE Lanes<GradSumsOp> merge(int64_t, const Lanes<GradSumsOp>& a, int64_t, const Lanes<GradSumsOp>& b) const {
    return {a.k[0] + b.k[0], a.k[1] + b.k[1]};
  }
  NF_INLINE Vec<double> next_pivot(Vec<double> pivot, const Lanes<GradSumsOp>&) const { return pivot; }
};

// grad_input = g * scale + (x - pivot) * slope + shift, where g is the gradient of z; grad_residual = g
template <class T_, bool kFused>
struct GradInputOp {
  using T = T_;
  using V = Block<compute_t<T>, T>;
  static constexpr int64_t kCoefficients = kRows<kFused>;

  Gradient<T, kFused> gradient;
  T* output;
  T* grad_residual;

  NF_INLINE bool outputs_are_aligned_alike() const {
    return grad_residual == nullptr ||
           bytes_to_alignment(grad_residual, kVectorBytes) == bytes_to_alignment(output, kVectorBytes);
  }

  template <class Width, class Put>
  NF_INLINE void operator()(int64_t offset, Width width, const Coefficients<GradInputOp>& c, const Put& put) const {
    const V x = gradient.value(offset, width);
    const V deviation = x - c.k[Row::kPivot];
    const V grad = gradient(offset, width, [&]() __attribute__((always_inline)) {
      return gradient.normalized(x, c.k[Row::kPivot], c.k[Row::kScale], c.k[kCoefficients - 1]);
    });
    if (kFused && grad_residual != nullptr) put(grad_residual + offset, grad, width);
    put(output + offset, grad * c.k[Row::kScale] + (deviation * c.k[Row::kSlope] + c.k[Row::kShift]), width);
  }
};

// grad_input = g * scale: where the statistics are constants, x has no part in its gradient, be it infinite.
template <class T_, bool kFused>
struct ScaleOp {
  using T = T_;
  using V = Block<compute_t<T>, T>;
  static constexpr int64_t kCoefficients = kFused ? kRows<kFused> : 1;

  Gradient<T, kFused> gradient;
  T* output;
  T* grad_residual;

  NF_INLINE bool outputs_are_aligned_alike() const {
    return grad_residual == nullptr ||
           bytes_to_alignment(grad_residual, kVectorBytes) == bytes_to_alignment(output, kVectorBytes);
  }

  template <class Width, class Put>
  NF_INLINE void operator()(int64_t offset, Width width, const Coefficients<ScaleOp>& c, const Put& put) const {
    const V grad = gradient(offset, width, [&]() __attribute__((always_inline)) {
      return gradient.normalized(gradient.value(offset, width), c.k[Row::kPivot], c.k[Row::kScale],
                                 c.k[kCoefficients - 1]);
    });
    if (kFused && grad_residual != nullptr) put(grad_residual + offset, grad, width);
    put(output + offset, grad * c.k[Row::kScale], width);
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
    const auto k = forward_coefficients<S>({args.mean[c0 + i], args.invstd[c0 + i], weight[i], bias[i]});
    table[c0 + i] = k.pivot;
    table[channels + c0 + i] = k.scale;
    table[2 * channels + c0 + i] = k.shift;
  }
}

// Results are a mean and an M2 of `count` values. `factor` is the share of this batch in the running statistics.
void finish_statistics(const BatchStatistics& args, int64_t count, const Results& results, double factor, int64_t c0,
                       int64_t n) {
  double running_mean[kEntries], running_var[kEntries];
  int64_t nonfinite[kEntries];
  read(args.running_mean, c0, n, 0, running_mean);
  read(args.running_var, c0, n, 0, running_var);
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const FinishedStatistics finished =
        finish({count, results(0, c0 + i), results(1, c0 + i)}, args, factor, running_mean[i], running_var[i]);
    args.mean[c0 + i] = finished.mean;
    args.invstd[c0 + i] = finished.invstd;
    running_mean[i] = finished.running_mean;
    running_var[i] = finished.running_var;
    nonfinite[i] = finished.nonfinite;
  }
  if (args.nonfinite_batches != nullptr)
    for (int64_t i = 0; i < n; ++i) args.nonfinite_batches[c0 + i] += nonfinite[i];
  write(args.running_mean, c0, n, running_mean);
  write(args.running_var, c0, n, running_var);
}

double count_batch(const BatchStatistics& args) {
  return update_factor(args.momentum, args.num_batches_tracked ? ++*args.num_batches_tracked : 1);
}

// What is needed before any gradient has been read: forward's coefficients.
template <class S, bool kFused>
void prepare_backward(const BatchNormBackward& args, S* table, int64_t c0, int64_t n) {
  const int64_t channels = args.view.channels;
  double weight[kEntries], bias[kEntries];
  read(args.weight, c0, n, 1, weight);
  read(args.bias, c0, n, 0, bias);
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const auto k = forward_coefficients<S>(normalization_of(args, c0 + i, weight[i], bias[i]));
    table[Row::kScale * channels + c0 + i] = k.scale;
    if constexpr (!kFused) continue;
    table[Row::kPivot * channels + c0 + i] = k.pivot;
    table[Row::kForwardShift * channels + c0 + i] = k.shift;
  }
}

// Results are the sums of GradSumsOp; null: the parameters' gradients are there already, and those of `count` values.
template <class S>
void finish_backward(const BatchNormBackward& args, const Results* results, int64_t count, S* table, int64_t c0,
                     int64_t n) {
  const int64_t channels = args.view.channels;
  double weight[kEntries], bias[kEntries], grad_weight[kEntries], grad_bias[kEntries];
  read(args.weight, c0, n, 1, weight);
  read(args.bias, c0, n, 0, bias);
  if (results == nullptr) {
    read(args.grad_weight, c0, n, 0, grad_weight);
    read(args.grad_bias, c0, n, 0, grad_bias);
  } else {
    NF_NO_ALIASES
    for (int64_t i = 0; i < n; ++i) {
      grad_bias[i] = (*results)(0, c0 + i);
      grad_weight[i] =
          grad_weight_of<S>(normalization_of(args, c0 + i, weight[i], bias[i]), grad_bias[i], (*results)(1, c0 + i));
    }
    write(args.grad_weight, c0, n, grad_weight);
    write(args.grad_bias, c0, n, grad_bias);
  }
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const auto k = backward_coefficients<S>(normalization_of(args, c0 + i, weight[i], bias[i]), count, grad_weight[i],
                                            grad_bias[i]);
    table[Row::kScale * channels + c0 + i] = k.scale;
    table[Row::kPivot * channels + c0 + i] = k.pivot;
    table[Row::kSlope * channels + c0 + i] = k.slope;
    table[Row::kShift * channels + c0 + i] = k.shift;
  }
}

// Calls f with the answer as a constant.
template <class F>
void for_fused(bool fused, const F& f) {
  fused ? f(std::true_type{}) : f(std::false_type{});
}

template <bool kFused, class T>
NormalizeOp<T, kFused> normalize_op(const BatchNormForward& args) {
  if (args.mask != nullptr) std::memset(args.mask, 0, static_cast<size_t>(mask_bytes(args.view.numel())));
  return {static_cast<const T*>(args.input),
          static_cast<T*>(args.output),
          static_cast<const T*>(args.residual),
          {args.activation},
          args.mask};
}

template <class T>
void batch_norm_training(const BatchNormForward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  using Reduce = MomentsOp<T, false>;
  const ChannelView& view = args.view;
  const Reduce moments{static_cast<const T*>(args.input)};
  const Plan plan = plan_reduction(view, sizeof(T), 1);
  const Workspace workspace(plan.position_units * Reduce::kSums * view.channels, 3 * view.channels * sizeof(S));
  const Results results{workspace.results, view.channels};
  S* const table = static_cast<S*>(workspace.table);
  const double factor = count_batch(args);

  for_fused(args.fused(), [&](auto fused) {
    const auto normalize = normalize_op<fused(), T>(args);
    const bool streaming = worth_streaming(normalize, view, plan, kTrainingPart);
    sweep(
        moments, view, plan, parallel, results,
        [&](int64_t c0, int64_t c1) {
          recompute_moments(moments, view, results, c0, c1);
          for_entries(c0, c1, [&](int64_t c, int64_t n) {
            finish_statistics(args, view.positions(), results, factor, c, n);
            forward_table(args, table, c, n);
          });
        },
        [&](const Unit& unit) { apply(normalize, view, unit, table, streaming); });
  });
}

// A pass over the tensor without a reduction before it.
template <class Op>
void apply_all(const Op& op, const ChannelView& view, const Parallel& parallel, const typename Op::V::S* table,
               int64_t cache_part) {
  const Plan plan = plan_elementwise(view, sizeof(typename Op::T), 2);
  const bool streaming = worth_streaming(op, view, plan, cache_part);
  parallel(plan.units(), grain(plan),
           [&](int64_t index) { apply(op, view, unit_of(plan, view, index), table, streaming); });
}

template <class T>
void batch_norm_inference(const BatchNormForward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  const ChannelView& view = args.view;
  const Workspace workspace(0, 3 * view.channels * sizeof(S));
  S* const table = static_cast<S*>(workspace.table);
  for_entries(0, view.channels, [&](int64_t c0, int64_t n) {
    if (args.running_mean) {
      read(args.running_mean, c0, n, 0, args.mean + c0);
      read(args.running_var, c0, n, 0, args.invstd + c0);
      for (int64_t c = c0; c < c0 + n; ++c) args.invstd[c] = invstd_of(args.invstd[c], args.eps);
    }
    forward_table(args, table, c0, n);
  });
  const int64_t cache_part = args.running_mean ? kInferencePart : kTrainingPart;
  for_fused(args.fused(),
            [&](auto fused) { apply_all(normalize_op<fused(), T>(args), view, parallel, table, cache_part); });
}

template <class T, bool kFused>
void batch_norm_backward(const BatchNormBackward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  using Reduce = GradSumsOp<T, kFused>;
  const ChannelView& view = args.view;
  const Gradient<T, kFused> gradient{static_cast<const T*>(args.grad_output),
                                     static_cast<const T*>(args.input),
                                     static_cast<const T*>(args.residual),
                                     {args.activation},
                                     args.mask,
                                     args.from_output};
  T* const grad_input = static_cast<T*>(args.grad_input);
  T* const grad_residual = static_cast<T*>(args.grad_residual);
  const GradInputOp<T, kFused> through_statistics{gradient, grad_input, grad_residual};
  const ScaleOp<T, kFused> past_statistics{gradient, grad_input, grad_residual};

  const bool reduces = args.count == nullptr && (args.training || args.grad_weight || args.grad_bias);
  const Plan plan = plan_reduction(view, sizeof(T), 2);
  const Workspace workspace(reduces ? plan.position_units * Reduce::kSums * view.channels : 0,
                            kRows<kFused> * view.channels * sizeof(S));
  S* const table = static_cast<S*>(workspace.table);
  if (kFused || !reduces)
    for_entries(0, view.channels, [&](int64_t c0, int64_t n) { prepare_backward<S, kFused>(args, table, c0, n); });
  if (args.count != nullptr) {
    for_entries(0, view.channels,
                [&](int64_t c0, int64_t n) { finish_backward(args, nullptr, *args.count, table, c0, n); });
    return apply_all(through_statistics, view, parallel, table, kTrainingPart);
  }
  if (!reduces) return apply_all(past_statistics, view, parallel, table, kTrainingPart);

  const Reduce sums{gradient, args.mean, table, view.channels};
  const Results results{workspace.results, view.channels};
  const bool streaming = worth_streaming(through_statistics, view, plan, kTrainingPart);
  sweep(
      sums, view, plan, parallel, results,
      [&](int64_t c0, int64_t c1) {
        for_entries(c0, c1,
                    [&](int64_t c, int64_t n) { finish_backward(args, &results, view.positions(), table, c, n); });
      },
      [&](const Unit& unit) {
        if (grad_input == nullptr) return;
        if (args.training)
          apply(through_statistics, view, unit, table, streaming);
        else
          apply(past_statistics, view, unit, table, streaming);
      });
}

template <class T>
void batch_norm_backward(const BatchNormBackward& args, const Parallel& parallel) {
  for_fused(args.fused(), [&](auto fused) { batch_norm_backward<T, fused()>(args, parallel); });
}
