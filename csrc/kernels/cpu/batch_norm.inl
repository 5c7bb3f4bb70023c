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
  NF_INLINE Pack<S, T> operator()(const Pack<S, T>& z) const {
    return Pack<S, T>::generate([&](int64_t i) {
      if (activation.is_piecewise_linear()) return normfused::activated<Elementary, S>(pieces, z.vec[i]);
      if (activation.kind == kHardswish.kind) return normfused::activated<Elementary, S>(kHardswish, z.vec[i]);
      return transcendental<S>(activation, z.vec[i]);
    });
  }
  template <class T>
  NF_INLINE Pack<S, T> gradient(const Pack<S, T>& z, const Pack<S, T>& grad) const {
    return Pack<S, T>::generate([&](int64_t i) {
      if (activation.is_piecewise_linear()) return activation_gradient<Elementary, S>(pieces, z.vec[i], grad.vec[i]);
      if (activation.kind == kHardswish.kind)
        return activation_gradient<Elementary, S>(kHardswish, z.vec[i], grad.vec[i]);
      return transcendental_gradient<S>(activation, z.vec[i], grad.vec[i]);
    });
  }
};

// z = (x - pivot) * scale + shift. Fused: z + residual, activated; the residual may be null.
template <class T_, bool kFused>
struct NormalizeOp {
  using T = T_;
  using V = Pack<compute_t<T>, T>;
  static constexpr int64_t kCoefficients = 3;

  const T* input;
  T* output;
  const T* residual;
  Activate<compute_t<T>> activate;
  uint8_t* mask;

  NF_INLINE bool outputs_share_alignment() const { return true; }

  template <class Width, class StoreFn>
  NF_INLINE void operator()(int64_t offset, Width width, const Coefficients<NormalizeOp>& c,
                            const StoreFn& store) const {
    V z = (load_pack<V>(input + offset, width) - c.k[0]) * c.k[1] + c.k[2];
    if constexpr (kFused) {
      if (residual != nullptr) z = z + load_pack<V>(residual + offset, width);
      if (mask != nullptr) store_bits(mask, offset, positive_bits(z), active_values<V>(width));
      z = activate(z);
    }
    store(output + offset, z, width);
  }
};

// What backward reads: x, and the gradient of z from that of the output.
template <class T, bool kFused>
struct PreActivationGradient {
  using S = compute_t<T>;
  using V = Pack<S, T>;

  const T* grad_output;
  const T* input;
  const T* residual;
  Activate<S> activate;
  const uint8_t* mask;
  bool from_output;

  // From the output it is z that stands for x.
  template <class Width>
  NF_INLINE V value(int64_t offset, Width width, const V& fill = V{}) const {
    const V x = load_pack(input + offset, width, fill);
    if (!kFused || !from_output) return x;
    return V::generate([&](int64_t i) { return deactivated(activate.pieces, x.vec[i]); });
  }
  NF_INLINE V normalized(const V& x, const V& pivot, const V& scale, const V& shift) const {
    return from_output ? x : (x - pivot) * scale + shift;
  }

  // normalize() is z before the residual; it is called where the activation's gradient depends on it.
  template <class Width, class F>
  NF_INLINE V operator()(int64_t offset, Width width, const F& normalize) const {
    const V grad = load_pack<V>(grad_output + offset, width);
    if constexpr (!kFused) return grad;
    if (mask != nullptr) {
      const V below = V::generate([&](int64_t i) { return sloped(activate.pieces, grad.vec[i]); });
      return select_by_bits(mask, offset, grad, below);
    }
    V z = normalize();
    if (residual != nullptr) z = z + load_pack<V>(residual + offset, width);
    return activate.gradient(z, grad);
  }

  NF_INLINE void prefetch(int64_t offset, int64_t n) const {
    prefetch_row(input + offset, n);
    prefetch_row(grad_output + offset, n);
    if (kFused && residual != nullptr) prefetch_row(residual + offset, n);
  }
};

// Rows of the table of coefficients in backward. The last, forward's shift, is there only where z is needed.
struct BackwardTable {
  static constexpr int64_t kScale = 0, kPivot = 1, kSlope = 2, kShift = 3, kForwardShift = 4;
};
template <bool kFused>
inline constexpr int64_t kBackwardTableSize = kFused ? 5 : 4;

// Sums of g and of g * (x - pivot), where g is the gradient of z and pivot is the mean rounded to S.
template <class T, bool kFused>
struct GradSumsOp {
  using S = compute_t<T>;
  using V = Pack<S, T>;
  static constexpr int64_t kSums = 2, kCoefficients = kFused ? 3 : 1;
  static constexpr bool kEstimatesPivot = false;

  PreActivationGradient<T, kFused> gradient;
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
    return table[(k == 0   ? BackwardTable::kPivot
                  : k == 1 ? BackwardTable::kScale
                           : BackwardTable::kForwardShift) *
                     channels +
                 c];
  }

  NF_INLINE ChannelResults<GradSumsOp> results_of(Vec<double>, int64_t, const ChannelResults<GradSumsOp>& sums) const {
    return sums;
  }
  NF_INLINE ChannelResults<GradSumsOp> merge(int64_t, const ChannelResults<GradSumsOp>& a, int64_t,
                                             const ChannelResults<GradSumsOp>& b) const {
    return {a.k[0] + b.k[0], a.k[1] + b.k[1]};
  }
  NF_INLINE Vec<double> next_pivot(Vec<double> pivot, const ChannelResults<GradSumsOp>&) const { return pivot; }
};

// grad_input = g * scale + (x - pivot) * slope + shift, where g is the gradient of z; grad_residual = g
template <class T_, bool kFused>
struct GradInputOp {
  using T = T_;
  using V = Pack<compute_t<T>, T>;
  static constexpr int64_t kCoefficients = kBackwardTableSize<kFused>;

  PreActivationGradient<T, kFused> gradient;
  T* output;
  T* grad_residual;

  NF_INLINE bool outputs_share_alignment() const {
    return grad_residual == nullptr ||
           bytes_to_alignment(grad_residual, kVectorBytes) == bytes_to_alignment(output, kVectorBytes);
  }

  template <class Width, class StoreFn>
  NF_INLINE void operator()(int64_t offset, Width width, const Coefficients<GradInputOp>& c,
                            const StoreFn& store) const {
    const V x = gradient.value(offset, width);
    const V deviation = x - c.k[BackwardTable::kPivot];
    const V grad = gradient(offset, width, [&]() __attribute__((always_inline)) {
      return gradient.normalized(x, c.k[BackwardTable::kPivot], c.k[BackwardTable::kScale], c.k[kCoefficients - 1]);
    });
    if (kFused && grad_residual != nullptr) store(grad_residual + offset, grad, width);
    store(output + offset,
          grad * c.k[BackwardTable::kScale] + (deviation * c.k[BackwardTable::kSlope] + c.k[BackwardTable::kShift]),
          width);
  }
};

// grad_input = g * scale: where the statistics are constants, x has no part in its gradient, be it infinite.
template <class T_, bool kFused>
struct FrozenGradInputOp {
  using T = T_;
  using V = Pack<compute_t<T>, T>;
  static constexpr int64_t kCoefficients = kFused ? kBackwardTableSize<kFused> : 1;

  PreActivationGradient<T, kFused> gradient;
  T* output;
  T* grad_residual;

  NF_INLINE bool outputs_share_alignment() const {
    return grad_residual == nullptr ||
           bytes_to_alignment(grad_residual, kVectorBytes) == bytes_to_alignment(output, kVectorBytes);
  }

  template <class Width, class StoreFn>
  NF_INLINE void operator()(int64_t offset, Width width, const Coefficients<FrozenGradInputOp>& c,
                            const StoreFn& store) const {
    const V grad = gradient(offset, width, [&]() __attribute__((always_inline)) {
      return gradient.normalized(gradient.value(offset, width), c.k[BackwardTable::kPivot], c.k[BackwardTable::kScale],
                                 c.k[kCoefficients - 1]);
    });
    if (kFused && grad_residual != nullptr) store(grad_residual + offset, grad, width);
    store(output + offset, grad * c.k[BackwardTable::kScale], width);
  }
};

// What follows is done per channel: statistics turned into coefficients, parameters' gradients and new running buffers.
// A table of coefficients has one row for each of the Op's, of all channels.

// NormalizeOp's, from args.mean and args.invstd.
template <class S>
void fill_forward_table(const BatchNormForward& args, S* table, int64_t c0, int64_t n) {
  const int64_t channels = args.view.channels;
  double weight[kChannelChunk], bias[kChannelChunk];
  read_channels(args.weight, c0, n, 1, weight);
  read_channels(args.bias, c0, n, 0, bias);
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const auto k = forward_coefficients<S>({args.mean[c0 + i], args.invstd[c0 + i], weight[i], bias[i]});
    table[c0 + i] = k.pivot;
    table[channels + c0 + i] = k.scale;
    table[2 * channels + c0 + i] = k.shift;
  }
}

// ResultTable are a mean and an M2 of `count` values. `factor` is the share of this batch in the running statistics.
void finish_statistics(const BatchStatistics& args, int64_t count, const ResultTable& results, double factor,
                       int64_t c0, int64_t n) {
  double running_mean[kChannelChunk], running_var[kChannelChunk];
  int64_t nonfinite[kChannelChunk];
  read_channels(args.running_mean, c0, n, 0, running_mean);
  read_channels(args.running_var, c0, n, 0, running_var);
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
  write_channels(args.running_mean, c0, n, running_mean);
  write_channels(args.running_var, c0, n, running_var);
}

double next_update_factor(const BatchStatistics& args) {
  return update_factor(args.momentum, args.num_batches_tracked ? ++*args.num_batches_tracked : 1);
}

// What is needed before any gradient has been read: forward's coefficients.
template <class S, bool kFused>
void fill_normalization_table(const BatchNormBackward& args, S* table, int64_t c0, int64_t n) {
  const int64_t channels = args.view.channels;
  double weight[kChannelChunk], bias[kChannelChunk];
  read_channels(args.weight, c0, n, 1, weight);
  read_channels(args.bias, c0, n, 0, bias);
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const auto k = forward_coefficients<S>(normalization_of(args, c0 + i, weight[i], bias[i]));
    table[BackwardTable::kScale * channels + c0 + i] = k.scale;
    if constexpr (!kFused) continue;
    table[BackwardTable::kPivot * channels + c0 + i] = k.pivot;
    table[BackwardTable::kForwardShift * channels + c0 + i] = k.shift;
  }
}

// ResultTable are the sums of GradSumsOp; null: the parameters' gradients are there already, and those of `count`
// values.
template <class S>
void finish_backward(const BatchNormBackward& args, const ResultTable* results, int64_t count, S* table, int64_t c0,
                     int64_t n) {
  const int64_t channels = args.view.channels;
  double weight[kChannelChunk], bias[kChannelChunk], grad_weight[kChannelChunk], grad_bias[kChannelChunk];
  read_channels(args.weight, c0, n, 1, weight);
  read_channels(args.bias, c0, n, 0, bias);
  if (results == nullptr) {
    read_channels(args.grad_weight, c0, n, 0, grad_weight);
    read_channels(args.grad_bias, c0, n, 0, grad_bias);
  } else {
    NF_NO_ALIASES
    for (int64_t i = 0; i < n; ++i) {
      grad_bias[i] = (*results)(0, c0 + i);
      grad_weight[i] =
          grad_weight_of<S>(normalization_of(args, c0 + i, weight[i], bias[i]), grad_bias[i], (*results)(1, c0 + i));
    }
    write_channels(args.grad_weight, c0, n, grad_weight);
    write_channels(args.grad_bias, c0, n, grad_bias);
  }
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const auto k = backward_coefficients<S>(normalization_of(args, c0 + i, weight[i], bias[i]), count, grad_weight[i],
                                            grad_bias[i]);
    table[BackwardTable::kScale * channels + c0 + i] = k.scale;
    table[BackwardTable::kPivot * channels + c0 + i] = k.pivot;
    table[BackwardTable::kSlope * channels + c0 + i] = k.slope;
    table[BackwardTable::kShift * channels + c0 + i] = k.shift;
  }
}

// Calls f with the answer as a constant.
template <class F>
void dispatch_fused(bool fused, const F& f) {
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
  const ResultTable results{workspace.results, view.channels};
  S* const table = static_cast<S*>(workspace.table);
  const double factor = next_update_factor(args);

  dispatch_fused(args.fused(), [&](auto fused) {
    const auto normalize = normalize_op<fused(), T>(args);
    const bool nontemporal = use_nontemporal_stores(normalize, view, plan, kTrainingCachePart);
    reduce_finalize_apply(
        moments, view, plan, parallel, results,
        [&](int64_t c0, int64_t c1) {
          recompute_moments(moments, view, results, c0, c1);
          for_each_channel_chunk(c0, c1, [&](int64_t c, int64_t n) {
            finish_statistics(args, view.positions(), results, factor, c, n);
            fill_forward_table(args, table, c, n);
          });
        },
        [&](const Unit& unit) { apply(normalize, view, unit, table, nontemporal); });
  });
}

// A pass over the tensor without a reduction before it.
template <class Op>
void apply_to_tensor(const Op& op, const ChannelView& view, const Parallel& parallel, const typename Op::V::S* table,
                     int64_t cache_part) {
  const Plan plan = plan_elementwise(view, sizeof(typename Op::T), 2);
  const bool nontemporal = use_nontemporal_stores(op, view, plan, cache_part);
  parallel(plan.units(), grain(plan),
           [&](int64_t index) { apply(op, view, unit_of(plan, view, index), table, nontemporal); });
}

template <class T>
void batch_norm_inference(const BatchNormForward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  const ChannelView& view = args.view;
  const Workspace workspace(0, 3 * view.channels * sizeof(S));
  S* const table = static_cast<S*>(workspace.table);
  for_each_channel_chunk(0, view.channels, [&](int64_t c0, int64_t n) {
    if (args.running_mean) {
      read_channels(args.running_mean, c0, n, 0, args.mean + c0);
      read_channels(args.running_var, c0, n, 0, args.invstd + c0);
      for (int64_t c = c0; c < c0 + n; ++c) args.invstd[c] = invstd_of(args.invstd[c], args.eps);
    }
    fill_forward_table(args, table, c0, n);
  });
  const int64_t cache_part = args.running_mean ? kInferenceCachePart : kTrainingCachePart;
  dispatch_fused(args.fused(), [&](auto fused) {
    apply_to_tensor(normalize_op<fused(), T>(args), view, parallel, table, cache_part);
  });
}

template <class T, bool kFused>
void batch_norm_backward(const BatchNormBackward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  using Reduce = GradSumsOp<T, kFused>;
  const ChannelView& view = args.view;
  const PreActivationGradient<T, kFused> gradient{static_cast<const T*>(args.grad_output),
                                                  static_cast<const T*>(args.input),
                                                  static_cast<const T*>(args.residual),
                                                  {args.activation},
                                                  args.mask,
                                                  args.from_output};
  T* const grad_input = static_cast<T*>(args.grad_input);
  T* const grad_residual = static_cast<T*>(args.grad_residual);
  const GradInputOp<T, kFused> through_statistics{gradient, grad_input, grad_residual};
  const FrozenGradInputOp<T, kFused> frozen{gradient, grad_input, grad_residual};

  const bool reduces = args.count == nullptr && (args.training || args.grad_weight || args.grad_bias);
  const Plan plan = plan_reduction(view, sizeof(T), 2);
  const Workspace workspace(reduces ? plan.position_units * Reduce::kSums * view.channels : 0,
                            kBackwardTableSize<kFused> * view.channels * sizeof(S));
  S* const table = static_cast<S*>(workspace.table);
  if (kFused || !reduces)
    for_each_channel_chunk(0, view.channels,
                           [&](int64_t c0, int64_t n) { fill_normalization_table<S, kFused>(args, table, c0, n); });
  if (args.count != nullptr) {
    for_each_channel_chunk(0, view.channels,
                           [&](int64_t c0, int64_t n) { finish_backward(args, nullptr, *args.count, table, c0, n); });
    return apply_to_tensor(through_statistics, view, parallel, table, kTrainingCachePart);
  }
  if (!reduces) return apply_to_tensor(frozen, view, parallel, table, kTrainingCachePart);

  const Reduce sums{gradient, args.mean, table, view.channels};
  const ResultTable results{workspace.results, view.channels};
  const bool nontemporal = use_nontemporal_stores(through_statistics, view, plan, kTrainingCachePart);
  reduce_finalize_apply(
      sums, view, plan, parallel, results,
      [&](int64_t c0, int64_t c1) {
        for_each_channel_chunk(
            c0, c1, [&](int64_t c, int64_t n) { finish_backward(args, &results, view.positions(), table, c, n); });
      },
      [&](const Unit& unit) {
        if (grad_input == nullptr) return;
        if (args.training)
          apply(through_statistics, view, unit, table, nontemporal);
        else
          apply(frozen, view, unit, table, nontemporal);
      });
}

template <class T>
void batch_norm_backward(const BatchNormBackward& args, const Parallel& parallel) {
  dispatch_fused(args.fused(), [&](auto fused) { batch_norm_backward<T, fused()>(args, parallel); });
}
