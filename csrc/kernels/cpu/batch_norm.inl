// Batch normalization: the ops (what is computed per element), the finish (what is computed per channel), and the
// kernels that combine them.
//
// With z = (x - mean) * invstd * weight + bias, the output is y = activation(z + residual). g is the gradient of z.
//
// All ops compute with pivot = mean rounded to S, and with coefficients that compensate for it (see math.h). The
// coefficients of all channels are in a (kCoefficients, channels) table in the workspace. kFused: the call has an
// activation, a residual or a mask.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/apply.inl"
#include "kernels/cpu/channel_stats.inl"
#include "kernels/cpu/channel_vector.inl"
#include "kernels/cpu/elementary.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// ---- activations -------------------------------------------------------------------------------------------------

// Transcendental activations except SiLU are function calls: inlined, they would take registers from every loop.
template <class E, class S>
NF_NOINLINE Vec<S> transcendental(const Activation& activation, Vec<S> z) {
  return normfused::activated<E, S>(activation, z);
}
template <class E, class S>
NF_NOINLINE Vec<S> transcendental_gradient(const Activation& activation, Vec<S> z, Vec<S> grad) {
  return activation_gradient<E, S>(activation, z, grad);
}

// The activation of a pack of values stored as T, and the gradient of its input.
template <class T>
struct Activate {
  using S = compute_t<T>;
  using V = Pack<S, T>;
  using E = elementary_t<T>;

  Activation activation;
  PiecewiseLinear<S> pieces = piecewise_linear<S>(activation);
  static constexpr Activation kHardswish{ActivationKind::kHardswish}, kSilu{ActivationKind::kSilu};

  NF_INLINE V operator()(const V& z) const {
    return V::generate([&](int64_t i) {
      if (activation.is_piecewise_linear()) return normfused::activated<E, S>(pieces, z.vec[i]);
      if (activation.kind == kSilu.kind) return normfused::activated<E, S>(kSilu, z.vec[i]);
      if (activation.kind == kHardswish.kind) return normfused::activated<E, S>(kHardswish, z.vec[i]);
      return transcendental<E, S>(activation, z.vec[i]);
    });
  }
  NF_INLINE V gradient(const V& z, const V& grad) const {
    return V::generate([&](int64_t i) {
      if (activation.is_piecewise_linear()) return activation_gradient<E, S>(pieces, z.vec[i], grad.vec[i]);
      if (activation.kind == kSilu.kind) return activation_gradient<E, S>(kSilu, z.vec[i], grad.vec[i]);
      if (activation.kind == kHardswish.kind) return activation_gradient<E, S>(kHardswish, z.vec[i], grad.vec[i]);
      return transcendental_gradient<E, S>(activation, z.vec[i], grad.vec[i]);
    });
  }
};

// ---- forward op --------------------------------------------------------------------------------------------------

// Rows of the coefficient table in forward.
struct ForwardTable {
  static constexpr int64_t kPivot = 0, kScale = 1, kShift = 2, kCoefficients = 3;
};

// z = (x - pivot) * scale + shift; fused, output = activation(z + residual). The residual and the mask may be null.
template <class T_, bool kFused>
struct NormalizeOp : ForwardTable {
  using T = T_;
  using V = Pack<compute_t<T>, T>;

  const T* input;
  T* output;
  const T* residual;
  Activate<T> activate;
  uint8_t* mask;  // written: the sign mask of z + residual

  NormalizeOp(const T* input, T* output, const T* residual, const Activation& activation, uint8_t* mask)
      : input(input), output(output), residual(residual), activate{activation}, mask(mask) {}

  NF_INLINE bool outputs_share_alignment() const { return true; }

  template <class Width, class StoreFn>
  NF_INLINE void operator()(int64_t offset, Width width, const Coefficients<NormalizeOp>& c,
                            const StoreFn& store) const {
    V z = (load_pack<V>(input + offset, width) - c.k[kPivot]) * c.k[kScale] + c.k[kShift];
    if constexpr (kFused) {
      if (residual != nullptr) z = z + load_pack<V>(residual + offset, width);
      if (mask != nullptr) store_bits(mask, offset, positive_bits(z), active_values<V>(width));
      z = activate(z);
    }
    store(output + offset, z, width);
  }
};

// ---- backward ops ------------------------------------------------------------------------------------------------

// Rows of the coefficient table in backward. kForwardShift is the shift that forward adds. It is needed to recompute z
// for the activation's gradient. Without fusion it is not read, and names an existing row.
template <bool kFused>
struct BackwardTable {
  static constexpr int64_t kScale = 0, kPivot = 1, kSlope = 2, kShift = 3, kForwardShift = kFused ? 4 : 3;
  static constexpr int64_t kRows = kForwardShift + 1;
};

// Reads x, and computes g from grad_output.
template <class T, bool kFused>
struct PreActivationGradient {
  using S = compute_t<T>;
  using V = Pack<S, T>;

  const T* grad_output;
  const T* input;  // x, or with from_output y
  const T* residual;
  Activate<T> activate;
  const uint8_t* mask;
  bool from_output;

  // x. With from_output it is z, recomputed from y: normalization_from_output() has coefficients for z.
  template <class Width>
  NF_INLINE V value(int64_t offset, Width width, const V& fill = V{}) const {
    const V x = load_pack(input + offset, width, fill);
    if (!kFused || !from_output) return x;
    return V::generate([&](int64_t i) { return deactivated(activate.pieces, x.vec[i]); });
  }
  // z, before the residual, from value().
  NF_INLINE V normalized(const V& x, const V& pivot, const V& scale, const V& shift) const {
    return from_output ? x : (x - pivot) * scale + shift;
  }

  // g. normalize() returns z; it is called only if the activation's gradient depends on it.
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

// Reduction: the sums of g and of g * (x - pivot).
template <class T, bool kFused>
struct GradSumsOp {
  using S = compute_t<T>;
  using V = Pack<S, T>;
  using Table = BackwardTable<kFused>;
  static constexpr int64_t kSums = 2, kReads = 2, kCoefficients = kFused ? 3 : 1;
  static constexpr int64_t kPivot = 0, kScale = kFused ? 1 : 0, kForwardShift = kFused ? 2 : 0;
  static constexpr bool kEstimatesPivot = false;

  PreActivationGradient<T, kFused> gradient;
  const double* mean;
  const S* table;
  int64_t channels;
  T* kept = nullptr;  // written: g; or null

  static NF_INLINE S identity(int64_t) { return 0; }
  template <class V>
  static NF_INLINE V join(int64_t, V a, V b) {
    return a + b;
  }

  template <class Width>
  NF_INLINE void accumulate(Sums<GradSumsOp>& sums, int64_t offset, Width width,
                            const Coefficients<GradSumsOp>& c) const {
    const V x = gradient.value(offset, width, c.k[kPivot]);
    const V deviation = x - c.k[kPivot];
    const V grad = gradient(offset, width, [&]() __attribute__((always_inline)) {
      return gradient.normalized(x, c.k[kPivot], c.k[kScale], c.k[kForwardShift]);
    });
    if constexpr (kFused && std::is_same_v<S, T>) {
      if (kept != nullptr) store_pack(kept + offset, grad, width);
    }
    sums.k[0] = sums.k[0] + grad;
    sums.k[1] = sums.k[1] + grad * deviation;
  }

  NF_INLINE void prefetch(int64_t offset, int64_t n) const { gradient.prefetch(offset, n); }
  NF_INLINE S coefficient(int64_t k, int64_t c, int64_t) const {
    if constexpr (!kFused) return static_cast<S>(mean[c]);
    return table[(k == kPivot ? Table::kPivot : k == kScale ? Table::kScale : Table::kForwardShift) * channels + c];
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

// Common to the two ops that write grad_input. grad_residual is g; it is null unless requested.
template <class T_, bool kFused>
struct GradInputOutputs : BackwardTable<kFused> {
  using T = T_;
  using V = Pack<compute_t<T>, T>;

  PreActivationGradient<T, kFused> gradient;
  T* output;  // grad_input
  T* grad_residual;

  GradInputOutputs(const PreActivationGradient<T, kFused>& gradient, T* grad_input, T* grad_residual)
      : gradient(gradient), output(grad_input), grad_residual(grad_residual) {}

  NF_INLINE bool outputs_share_alignment() const {
    return grad_residual == nullptr ||
           bytes_to_alignment(grad_residual, kVectorBytes) == bytes_to_alignment(output, kVectorBytes);
  }
};

// grad_input = g * scale + (x - pivot) * slope + shift: the statistics depend on x.
template <class T, bool kFused>
struct GradInputOp : GradInputOutputs<T, kFused> {
  using Base = GradInputOutputs<T, kFused>;
  using Base::Base, Base::gradient, Base::grad_residual, Base::output;
  using typename Base::V;
  static constexpr int64_t kCoefficients = Base::kRows;

  template <class Width, class StoreFn>
  NF_INLINE void operator()(int64_t offset, Width width, const Coefficients<GradInputOp>& c,
                            const StoreFn& store) const {
    const V x = gradient.value(offset, width);
    const V deviation = x - c.k[Base::kPivot];
    const V grad = gradient(offset, width, [&]() __attribute__((always_inline)) {
      return gradient.normalized(x, c.k[Base::kPivot], c.k[Base::kScale], c.k[Base::kForwardShift]);
    });
    if (kFused && grad_residual != nullptr) store(grad_residual + offset, grad, width);
    store(output + offset, grad * c.k[Base::kScale] + (deviation * c.k[Base::kSlope] + c.k[Base::kShift]), width);
  }
};

// grad_input = g * scale: the statistics are constants (inference). x is not part of the result, even if it is
// infinite.
template <class T, bool kFused>
struct FrozenGradInputOp : GradInputOutputs<T, kFused> {
  using Base = GradInputOutputs<T, kFused>;
  using Base::Base, Base::gradient, Base::grad_residual, Base::output;
  using typename Base::V;
  static constexpr int64_t kCoefficients = kFused ? Base::kRows : 1;

  template <class Width, class StoreFn>
  NF_INLINE void operator()(int64_t offset, Width width, const Coefficients<FrozenGradInputOp>& c,
                            const StoreFn& store) const {
    const V grad = gradient(offset, width, [&]() __attribute__((always_inline)) {
      return gradient.normalized(gradient.value(offset, width), c.k[Base::kPivot], c.k[Base::kScale],
                                 c.k[Base::kForwardShift]);
    });
    if (kFused && grad_residual != nullptr) store(grad_residual + offset, grad, width);
    store(output + offset, grad * c.k[Base::kScale], width);
  }
};

// ---- finish: statistics, coefficients and parameter gradients, per channel ---------------------------------------
// Each function processes the channels [c0, c0 + n), n <= kChannelChunk, and writes their columns of the table.

// Weight and bias of a chunk of channels; 1 and 0 if absent.
struct Affine {
  double weight[kChannelChunk], bias[kChannelChunk];

  Affine(const ChannelVector& weight_, const ChannelVector& bias_, int64_t c0, int64_t n) {
    read_channels(weight_, c0, n, 1, weight);
    read_channels(bias_, c0, n, 0, bias);
  }
};

// From args.mean and args.invstd to ForwardTable.
template <class S>
void fill_forward_table(const BatchNormForward& args, S* table, int64_t c0, int64_t n) {
  const int64_t channels = args.view.channels;
  const Affine affine(args.weight, args.bias, c0, n);
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const auto k = forward_coefficients<S>({args.mean[c0 + i], args.invstd[c0 + i], affine.weight[i], affine.bias[i]});
    table[ForwardTable::kPivot * channels + c0 + i] = k.pivot;
    table[ForwardTable::kScale * channels + c0 + i] = k.scale;
    table[ForwardTable::kShift * channels + c0 + i] = k.shift;
  }
}

// Writes args.mean and args.invstd and updates the running statistics. The results are the mean and M2 of `count`
// values; `factor` is the weight of this batch in the running statistics.
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

// Counts this batch in num_batches_tracked and returns its weight in the running statistics.
double next_update_factor(const BatchStatistics& args) {
  if (args.num_batches_tracked == nullptr) return update_factor(args.momentum, 1);
  // Atomic: several threads may train one layer at the same time.
  return update_factor(args.momentum, __atomic_add_fetch(args.num_batches_tracked, 1, __ATOMIC_RELAXED));
}

// The rows of BackwardTable that do not depend on any gradient: scale and, if fused, pivot and forward shift.
template <class S, bool kFused>
void fill_normalization_table(const BatchNormBackward& args, S* table, int64_t c0, int64_t n) {
  using Table = BackwardTable<kFused>;
  const int64_t channels = args.view.channels;
  const Affine affine(args.weight, args.bias, c0, n);
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const auto k = forward_coefficients<S>(normalization_of(args, c0 + i, affine.weight[i], affine.bias[i]));
    table[Table::kScale * channels + c0 + i] = k.scale;
    if constexpr (!kFused) continue;
    table[Table::kPivot * channels + c0 + i] = k.pivot;
    table[Table::kForwardShift * channels + c0 + i] = k.shift;
  }
}

// Computes the parameter gradients from `results`, the sums of GradSumsOp, and writes those that are requested. If
// `results` is null, they were already reduced over all ranks, and are read instead. Then fills the rest of
// BackwardTable. `count` is the number of values per channel in the sums.
template <class S>
void finish_backward(const BatchNormBackward& args, const ResultTable* results, int64_t count, S* table, int64_t c0,
                     int64_t n) {
  using Table = BackwardTable<false>;
  const int64_t channels = args.view.channels;
  const Affine affine(args.weight, args.bias, c0, n);
  double grad_weight[kChannelChunk], grad_bias[kChannelChunk];
  if (results == nullptr) {
    read_channels(args.grad_weight, c0, n, 0, grad_weight);
    read_channels(args.grad_bias, c0, n, 0, grad_bias);
  } else {
    NF_NO_ALIASES
    for (int64_t i = 0; i < n; ++i) {
      grad_bias[i] = (*results)(0, c0 + i);
      grad_weight[i] = grad_weight_of<S>(normalization_of(args, c0 + i, affine.weight[i], affine.bias[i]), grad_bias[i],
                                         (*results)(1, c0 + i));
    }
    write_channels(args.grad_weight, c0, n, grad_weight);
    write_channels(args.grad_bias, c0, n, grad_bias);
  }
  NF_NO_ALIASES
  for (int64_t i = 0; i < n; ++i) {
    const auto k = backward_coefficients<S>(normalization_of(args, c0 + i, affine.weight[i], affine.bias[i]), count,
                                            grad_weight[i], grad_bias[i]);
    table[Table::kScale * channels + c0 + i] = k.scale;
    table[Table::kPivot * channels + c0 + i] = k.pivot;
    table[Table::kSlope * channels + c0 + i] = k.slope;
    table[Table::kShift * channels + c0 + i] = k.shift;
  }
}

// ---- kernels -----------------------------------------------------------------------------------------------------

// Calls f with std::true_type or std::false_type.
template <class F>
void dispatch_fused(bool fused, const F& f) {
  fused ? f(std::true_type{}) : f(std::false_type{});
}

// Clears the mask: store_bits() requires zeros.
template <bool kFused, class T>
NormalizeOp<T, kFused> normalize_op(const BatchNormForward& args) {
  if (args.mask != nullptr) std::memset(args.mask, 0, static_cast<size_t>(mask_bytes(args.view.numel())));
  return {static_cast<const T*>(args.input), static_cast<T*>(args.output), static_cast<const T*>(args.residual),
          args.activation, args.mask};
}

template <class T>
void batch_norm_training(const BatchNormForward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  using Reduce = MomentsOp<T, false>;
  const ChannelView& view = args.view;
  const Reduce moments{static_cast<const T*>(args.input), args.eps};
  const Plan plan = plan_reduction(view, sizeof(T), 1);
  const Workspace workspace(plan.position_units * Reduce::kSums * view.channels,
                            ForwardTable::kCoefficients * view.channels * sizeof(S));
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

template <class T>
void batch_norm_inference(const BatchNormForward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  const ChannelView& view = args.view;
  const Workspace workspace(0, ForwardTable::kCoefficients * view.channels * sizeof(S));
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

// Three cases:
//   args.count      the gradients of weight and bias are known, reduced over all ranks: apply
//   no reduction    frozen statistics and no parameter gradients requested: apply
//   otherwise       reduce, finish, apply
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
                            BackwardTable<kFused>::kRows * view.channels * sizeof(S));
  S* const table = static_cast<S*>(workspace.table);
  const auto finish = [&](const ResultTable* results, int64_t count, int64_t c0, int64_t c1) {
    for_each_channel_chunk(c0, c1, [&](int64_t c, int64_t n) { finish_backward(args, results, count, table, c, n); });
  };

  if (kFused || !reduces)
    for_each_channel_chunk(0, view.channels,
                           [&](int64_t c0, int64_t n) { fill_normalization_table<S, kFused>(args, table, c0, n); });
  if (args.count != nullptr) {
    finish(nullptr, *args.count, 0, view.channels);
    return apply_to_tensor(through_statistics, view, parallel, table, kTrainingCachePart);
  }
  if (!reduces) return apply_to_tensor(frozen, view, parallel, table, kTrainingCachePart);

  const Reduce sums{gradient, args.mean, table, view.channels};
  const ResultTable results{workspace.results, view.channels};
  const bool nontemporal = use_nontemporal_stores(through_statistics, view, plan, kTrainingCachePart);
  reduce_finalize_apply(
      sums, view, plan, parallel, results, [&](int64_t c0, int64_t c1) { finish(&results, view.positions(), c0, c1); },
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

}  // namespace
}  // namespace normfused::cpu::NF_ISA
