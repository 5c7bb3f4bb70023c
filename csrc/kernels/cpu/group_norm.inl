// Group norm, of which instance norm is the case of one channel per group: normalization of each sample by statistics
// over groups of its channels.
//
// The ops are those of batch norm, applied to the tensor as a ChannelView in which each sample has channels of its own
// (GroupView::by_channel). Only the finish differs: it merges the results of the channels of a group, and fills one
// column of the coefficient table for each channel of each sample.
//
// A result depends on the values of its sample only, not on the number of samples and threads: plans depend on the
// shape of a sample, and each sum is computed in the same order wherever it runs.
#pragma once

#ifndef NF_ISA
#include "kernels/cpu/editor.h"
#endif
#include "kernels/cpu/batch_norm.inl"

namespace normfused::cpu::NF_ISA {
namespace {

// With at least this many tasks, a task runs all of its parts itself: there is enough work for all threads without a
// division of the tasks, and no barrier.
inline constexpr int64_t kEnoughTasks = 32;
// Minimum number of tasks per thread for loops over channels, which are short.
inline constexpr int64_t kChannelGrain = 32;

// Runs the phases of `tasks` tasks of `plan.parts()` parts each: reduce(task, part), then finish(task), then
// apply(task, part) in descending order, because the last values are still in cache.
template <class Reduce, class Finish, class Apply>
void run_phases(const GroupPlan& plan, int64_t tasks, const Parallel& parallel, const Reduce& reduce,
                const Finish& finish, const Apply& apply) {
  const int64_t parts = plan.parts();
  if (parts == 1 || tasks >= kEnoughTasks) {
    return parallel(tasks, grain(plan), [&](int64_t task) {
      for (int64_t part = 0; part < parts; ++part) reduce(task, part);
      finish(task);
      for (int64_t part = parts; part-- > 0;) apply(task, part);
    });
  }
  parallel(tasks * parts, grain(plan), [&](int64_t index) { reduce(index / parts, index % parts); });
  parallel(tasks, 1, finish);
  parallel.backwards(tasks * parts, grain(plan), [&](int64_t index) { apply(index / parts, index % parts); });
}

// The columns of one sample in a (coefficients, columns) table.
template <class S>
struct SampleTable {
  S* data;
  int64_t stride;

  S& operator()(int64_t k, int64_t channel) const { return data[k * stride + channel]; }
};

// A table of `rows` rows with a column for each channel of each sample. Channels first, all samples are columns of one
// table, as the view has them. Channels last, each sample has a table of its own, after that of the sample before.
template <class S>
struct CoefficientTable {
  S* data;
  const GroupView& view;
  int64_t rows;

  int64_t stride() const { return view.channels_last ? view.channels : view.samples * view.channels; }
  SampleTable<S> of(int64_t sample) const {
    return {data + sample * view.channels * (view.channels_last ? rows : 1), stride()};
  }
  // What apply() takes for a unit of this sample.
  const S* base(int64_t sample) const { return view.channels_last ? of(sample).data : data; }
  static int64_t bytes(const GroupView& view, int64_t rows) {
    return rows * view.samples * view.channels * static_cast<int64_t>(sizeof(S));
  }
};

// The results of an op for each channel of each sample and each split. The columns are those of CoefficientTable:
// channels last, those of a sample are the channels, and its results follow those of the sample before.
struct GroupResults {
  double* data;
  const GroupView& view;
  int64_t splits, sums;

  static int64_t size(const GroupView& view, int64_t splits, int64_t sums) {
    return splits * sums * view.samples * view.channels;
  }
  int64_t columns() const { return view.channels_last ? view.channels : view.samples * view.channels; }
  int64_t column(int64_t sample) const { return view.channels_last ? 0 : sample * view.channels; }
  ResultTable of(int64_t sample, int64_t split) const {
    const int64_t before = view.channels_last ? sample * splits + split : split;
    return {data + before * sums * columns(), columns()};
  }
};

// ---- division into units -----------------------------------------------------------------------------------------

// The parts of a tensor's tasks, as units of GroupView::by_channel().
struct GroupUnits {
  const GroupView& view;
  const GroupPlan& plan;

  // Channels last, a task has statistics of one sample.
  int64_t ranges() const { return (view.groups + plan.statistics - 1) / plan.statistics; }
  int64_t tasks() const {
    return view.channels_last ? view.samples * ranges() : (view.statistics() + plan.statistics - 1) / plan.statistics;
  }
  int64_t sample(int64_t task) const { return view.channels_last ? task / ranges() : 0; }
  // The statistics [first, last) of a task, counted over all samples.
  int64_t first(int64_t task) const {
    return sample(task) * view.groups + (view.channels_last ? task % ranges() : task) * plan.statistics;
  }
  int64_t last(int64_t task) const {
    return minimum(first(task) + plan.statistics,
                   view.channels_last ? (sample(task) + 1) * view.groups : view.statistics());
  }

  // Channels first, the rows of a part are channels of a group; of all groups of the task if there is one part.
  Unit operator()(int64_t task, int64_t part) const {
    const int64_t m0 = part % plan.splits * plan.position_block;
    const int64_t m1 = minimum(m0 + plan.position_block, view.inner);
    const int64_t begin = first(task) * view.width(), end = last(task) * view.width();
    if (view.channels_last) {
      const int64_t before = sample(task) * view.channels, row = sample(task) * view.inner;
      return {begin - before, end - before, row + m0, row + m1};
    }
    if (plan.parts() == 1) return {begin, end, 0, view.inner};
    const int64_t c0 = begin + part / plan.splits * plan.row_block;
    return {c0, minimum(c0 + plan.row_block, end), m0, m1};
  }
};

// Calls f(unit) for the rows of `inner` values that a unit of runs covers: of statistics [c0, c1), `width` rows each,
// the values [m0, m1).
template <class F>
void for_each_row_range(const GroupView& view, const Unit& runs, const F& f) {
  const int64_t width = view.width(), inner = view.inner;
  if (runs.m1 - runs.m0 == width * inner) return f(Unit{runs.c0 * width, runs.c1 * width, 0, inner});
  for (int64_t m = runs.m0; m < runs.m1;) {
    const int64_t row = runs.c0 * width + m / inner, i = m % inner;
    const int64_t whole = i == 0 ? (runs.m1 - m) / inner : 0;
    const int64_t end = minimum(inner, i + runs.m1 - m);
    f(whole > 0 ? Unit{row, row + whole, 0, inner} : Unit{row, row + 1, i, end});
    m += whole > 0 ? whole * inner : end - i;
  }
}

// Reduces a unit of more channels than the engine takes at once.
template <class Op>
void reduce_wide(const Op& op, const ChannelView& view, const Unit& unit, const ResultTable& results) {
  const int64_t most = view.inner == 1 ? kMaxLanes : kMaxChannelsFirst;
  for (int64_t c0 = unit.c0; c0 < unit.c1; c0 += most)
    reduce(op, view, {c0, minimum(c0 + most, unit.c1), unit.m0, unit.m1}, results);
}

// Merges the results of `splits` ranges of `block` of `positions` positions into those of the first.
template <class Op>
void merge_ranges(const Op& op, int64_t positions, const GroupPlan& plan, const ResultTable& results, int64_t c0,
                  int64_t c1) {
  const Plan by_split{0, 0, plan.position_block, plan.splits, 0, 0};
  merge_splits(op, {1, results.channels, positions}, by_split, results, c0, c1);
}

// Whether stores bypass the caches: as in batch norm, if the parts of a sample and the samples are aligned. Channels
// first, a unit of rows of one value is a row of lanes that begins at the first value of a group, aligned or not.
template <class Op>
bool use_nontemporal_stores(const Op& op, const GroupView& view, const GroupPlan& plan) {
  if (!view.channels_last && view.inner == 1) return false;
  const auto aligned = [&](int64_t block) {
    return use_nontemporal_stores(op, view.by_channel(), Plan{0, 0, block, 0, 0, 0}, kTrainingCachePart);
  };
  return aligned(plan.position_block) && aligned(view.inner);
}

// ---- finish ------------------------------------------------------------------------------------------------------

// Writes mean and invstd of a statistic, and the columns of ForwardTable of its channels.
template <class S>
void finish_group(const GroupNormForward& args, int64_t statistic, const Moments& moments,
                  const SampleTable<S>& table) {
  const GroupView& view = args.view;
  const int64_t sample = statistic / view.groups, first = statistic % view.groups * view.width();
  const double mean = args.mean[statistic] = moments.mean;
  const double invstd = args.invstd[statistic] = invstd_of(biased_variance(moments), args.eps);
  for_each_channel_chunk(first, first + view.width(), [&](int64_t c0, int64_t n) {
    double weight[kChannelChunk], bias[kChannelChunk];
    read_channels(args.weight, args.weight.first(sample, view.channels) + c0, n, 1, weight);
    read_channels(args.bias, args.bias.first(sample, view.channels) + c0, n, 0, bias);
    NF_NO_ALIASES
    for (int64_t i = 0; i < n; ++i) {
      const auto k = forward_coefficients<S>({mean, invstd, weight[i], bias[i]});
      table(ForwardTable::kPivot, c0 + i) = k.pivot;
      table(ForwardTable::kScale, c0 + i) = k.scale;
      table(ForwardTable::kShift, c0 + i) = k.shift;
    }
  });
}

// The rows of BackwardTable that do not depend on any gradient, and the mean of each channel.
template <class S, bool kFused>
void begin_backward(const GroupNormBackward& args, int64_t statistic, double* mean, const SampleTable<S>& table) {
  using Table = BackwardTable<kFused>;
  const GroupView& view = args.view;
  const int64_t sample = statistic / view.groups, first = statistic % view.groups * view.width();
  for (int64_t c = first; c < first + view.width(); ++c) mean[sample * view.channels + c] = args.mean[statistic];
  if constexpr (!kFused) return;
  for_each_channel_chunk(first, first + view.width(), [&](int64_t c0, int64_t n) {
    double weight[kChannelChunk], bias[kChannelChunk];
    read_channels(args.weight, args.weight.first(sample, view.channels) + c0, n, 1, weight);
    read_channels(args.bias, args.bias.first(sample, view.channels) + c0, n, 0, bias);
    NF_NO_ALIASES
    for (int64_t i = 0; i < n; ++i) {
      const auto k = forward_coefficients<S>({args.mean[statistic], args.invstd[statistic], weight[i], bias[i]});
      table(Table::kScale, c0 + i) = k.scale;
      table(Table::kPivot, c0 + i) = k.pivot;
      table(Table::kForwardShift, c0 + i) = k.shift;
    }
  });
}

// Replaces the sums of GradSumsOp of each channel of a statistic by its gradients of bias (row 0) and weight (row 1),
// and fills the rest of BackwardTable. With gradients of z weighted by `weight`, the statistic is that of a batch norm
// without parameters.
template <class S>
void finish_group_backward(const GroupNormBackward& args, int64_t statistic, const ResultTable& results, int64_t column,
                           const SampleTable<S>& table) {
  using Table = BackwardTable<false>;
  const GroupView& view = args.view;
  const int64_t sample = statistic / view.groups, first = statistic % view.groups * view.width();
  const Normalization plain{args.mean[statistic], args.invstd[statistic], 1, 0};
  double grad_weight = 0, grad_bias = 0, weight[kChannelChunk];
  for_each_channel_chunk(first, first + view.width(), [&](int64_t c0, int64_t n) {
    read_channels(args.weight, args.weight.first(sample, view.channels) + c0, n, 1, weight);
    for (int64_t i = 0; i < n; ++i) {
      double& of_bias = results(0, column + c0 + i);
      double& of_weight = results(1, column + c0 + i);
      of_weight = grad_weight_of<S>(plain, of_bias, of_weight);
      grad_weight += weight[i] * of_weight;
      grad_bias += weight[i] * of_bias;
      table(Table::kScale, c0 + i) = static_cast<S>(weight[i] * plain.invstd);
    }
  });
  const auto k = backward_coefficients<S>(plain, view.count(), grad_weight, grad_bias);
  for (int64_t c = first; c < first + view.width(); ++c) {
    table(Table::kPivot, c) = k.pivot;
    table(Table::kSlope, c) = k.slope;
    table(Table::kShift, c) = k.shift;
  }
}

// Writes the gradients of a parameter, which are in this row of the results: of each sample, or their sum in sample
// order.
void write_parameter_gradient(const GroupResults& results, int64_t row, const SampleParameter& output,
                              const Parallel& parallel) {
  if (!output) return;
  const GroupView& view = results.view;
  const int64_t rows = output.by_sample ? view.samples : 1,
                chunks = (view.channels + kChannelChunk - 1) / kChannelChunk;
  parallel(rows * chunks, kChannelGrain, [&](int64_t task) {
    const int64_t first = task / chunks, c0 = task % chunks * kChannelChunk;
    const int64_t n = minimum(kChannelChunk, view.channels - c0);
    double total[kChannelChunk] = {};
    for (int64_t sample = first; sample < (output.by_sample ? first + 1 : view.samples); ++sample) {
      const double* const of_sample = &results.of(sample, 0)(row, results.column(sample) + c0);
      for (int64_t i = 0; i < n; ++i) total[i] += of_sample[i];
    }
    write_channels(output, first * view.channels + c0, n, total);
  });
}

// ---- kernels -----------------------------------------------------------------------------------------------------

template <class T, bool kFused>
NormalizeOp<T, kFused> normalize_op(const GroupNormForward& args) {
  if (args.mask != nullptr) std::memset(args.mask, 0, static_cast<size_t>(mask_bytes(args.view.numel())));
  return {static_cast<const T*>(args.input), static_cast<T*>(args.output), static_cast<const T*>(args.residual),
          args.activation, args.mask};
}

// Channels first, the values of a statistic are contiguous: they are reduced as one run, and applied by channel.
template <class T, bool kFused>
void group_norm_channels_first(const GroupNormForward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  using Reduce = MomentsOp<T, false>;
  const GroupView& view = args.view;
  const ChannelView runs{1, view.statistics(), view.count()}, channels = view.by_channel();
  const GroupView by_run{1, view.statistics(), view.statistics(), view.count(), false};
  const GroupPlan plan = plan_rows(1, view.count(), sizeof(T));
  const GroupUnits units{by_run, plan};
  const Workspace workspace(plan.splits * Reduce::kSums * runs.channels,
                            CoefficientTable<S>::bytes(view, ForwardTable::kCoefficients));
  const ResultTable results{workspace.results, runs.channels};
  const CoefficientTable<S> table{static_cast<S*>(workspace.table), view, ForwardTable::kCoefficients};
  const Reduce moments{static_cast<const T*>(args.input), args.eps};
  const auto normalize = normalize_op<T, kFused>(args);
  const bool nontemporal = use_nontemporal_stores(normalize, view, plan);
  run_phases(
      plan, units.tasks(), parallel,
      [&](int64_t task, int64_t part) {
        reduce_wide(moments, runs, units(task, part), {&results(part * Reduce::kSums, 0), runs.channels});
      },
      [&](int64_t task) {
        const int64_t first = units.first(task), last = units.last(task);
        if (plan.splits > 1) merge_ranges(moments, view.count(), plan, results, first, last);
        recompute_moments(moments, runs, results, first, last);
        for (int64_t statistic = first; statistic < last; ++statistic)
          finish_group(args, statistic, {view.count(), results(0, statistic), results(1, statistic)},
                       table.of(statistic / view.groups));
      },
      [&](int64_t task, int64_t part) {
        for_each_row_range(view, units(task, part),
                           [&](const Unit& unit) { apply(normalize, channels, unit, table.base(0), nontemporal); });
      });
}

// Channels last, each channel of a sample is reduced by itself, and the moments of a group's channels are merged.
template <class T, bool kFused>
void group_norm_channels_last(const GroupNormForward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  using Reduce = MomentsOp<T, false>;
  const GroupView& view = args.view;
  const ChannelView channels = view.by_channel();
  const GroupPlan plan = plan_columns(view.inner, view.groups, view.width() * static_cast<int64_t>(sizeof(T)), 1);
  const GroupUnits units{view, plan};
  const Workspace workspace(GroupResults::size(view, plan.splits, Reduce::kSums),
                            CoefficientTable<S>::bytes(view, ForwardTable::kCoefficients));
  const GroupResults all{workspace.results, view, plan.splits, Reduce::kSums};
  const CoefficientTable<S> table{static_cast<S*>(workspace.table), view, ForwardTable::kCoefficients};
  const T* const input = static_cast<const T*>(args.input);
  const auto normalize = normalize_op<T, kFused>(args);
  const bool nontemporal = use_nontemporal_stores(normalize, view, plan);
  run_phases(
      plan, units.tasks(), parallel,
      [&](int64_t task, int64_t part) {
        reduce_wide(Reduce{input, args.eps}, channels, units(task, part), all.of(units.sample(task), part));
      },
      [&](int64_t task) {
        const int64_t sample = units.sample(task), first = units.first(task), last = units.last(task);
        const ResultTable results = all.of(sample, 0);
        const Reduce moments{input + sample * view.inner * view.channels, args.eps};
        const Unit unit = units(task, 0);
        merge_ranges(moments, view.inner, plan, results, unit.c0, unit.c1);
        recompute_moments(moments, {view.inner, view.channels, 1}, results, unit.c0, unit.c1);
        for (int64_t statistic = first; statistic < last; ++statistic) {
          const int64_t c0 = unit.c0 + (statistic - first) * view.width();
          Moments group{};
          for (int64_t c = c0; c < c0 + view.width(); ++c)
            group = merge(group, Moments{view.inner, results(0, c), results(1, c)});
          finish_group(args, statistic, group, table.of(sample));
        }
      },
      [&](int64_t task, int64_t part) {
        apply(normalize, channels, units(task, part), table.base(units.sample(task)), nontemporal);
      });
}

template <class T>
void group_norm(const GroupNormForward& args, const Parallel& parallel) {
  dispatch_fused(args.fused(), [&](auto fused) {
    if (args.view.channels_last)
      group_norm_channels_last<T, fused()>(args, parallel);
    else
      group_norm_channels_first<T, fused()>(args, parallel);
  });
}

// The ops of one call of backward.
template <class T, bool kFused>
struct GroupBackward {
  using S = compute_t<T>;

  const GroupNormBackward& args;
  ChannelView channels;
  PreActivationGradient<T, kFused> gradient;
  // Where the activation's gradient is expensive, the reduction stores it for the application, if it is exact as T and
  // the task fits the cache. Null: the application computes it once more.
  T* kept;
  GradInputOp<T, kFused> grad_input;
  GradInputOp<T, false> grad_input_from_kept;
  bool nontemporal;

  GroupBackward(const GroupNormBackward& args, const GroupPlan& plan)
      : args(args),
        channels(args.view.by_channel()),
        gradient{static_cast<const T*>(args.grad_output),
                 static_cast<const T*>(args.input),
                 static_cast<const T*>(args.residual),
                 {args.activation},
                 args.mask,
                 false},
        kept(kFused && std::is_same_v<S, T> && args.activation.is_transcendental() && plan.parts() == 1
                 ? static_cast<T*>(args.grad_residual != nullptr ? args.grad_residual : args.grad_input)
                 : nullptr),
        grad_input(gradient, static_cast<T*>(args.grad_input), static_cast<T*>(args.grad_residual)),
        grad_input_from_kept({kept, gradient.input, nullptr, {{}}, nullptr, false}, grad_input.output, nullptr),
        nontemporal(args.grad_input != nullptr && kept != args.grad_input &&
                    use_nontemporal_stores(grad_input, args.view, plan)) {}

  void apply_to(const Unit& unit, const S* table) const {
    if (args.grad_input == nullptr) return;
    if (kept != nullptr)
      apply(grad_input_from_kept, channels, unit, table, nontemporal);
    else
      apply(grad_input, channels, unit, table, nontemporal);
  }
};

// In both layouts, each channel of a sample is reduced by itself: the gradients of weight and bias need these sums.
template <class T, bool kFused>
void group_norm_backward(const GroupNormBackward& args, const Parallel& parallel) {
  using S = compute_t<T>;
  using Reduce = GradSumsOp<T, kFused>;
  const GroupView& view = args.view;
  const int64_t item = sizeof(T);
  const GroupPlan plan = view.channels_last ? plan_columns(view.inner, view.groups, view.width() * item, 2)
                                            : plan_rows(view.width(), view.inner, 2 * item);
  const GroupUnits units{view, plan};
  const int64_t means = view.samples * view.channels;
  const Workspace workspace(means + GroupResults::size(view, plan.splits, Reduce::kSums),
                            CoefficientTable<S>::bytes(view, BackwardTable<kFused>::kRows));
  double* const mean = workspace.results;
  const GroupResults all{mean + means, view, plan.splits, Reduce::kSums};
  const CoefficientTable<S> table{static_cast<S*>(workspace.table), view, BackwardTable<kFused>::kRows};
  const GroupBackward<T, kFused> call(args, plan);
  const auto for_each_statistic = [&](int64_t task, const auto& f) {
    for (int64_t statistic = units.first(task); statistic < units.last(task); ++statistic)
      f(statistic, statistic / view.groups);
  };

  parallel(units.tasks(), kChannelGrain, [&](int64_t task) {
    for_each_statistic(task, [&](int64_t statistic, int64_t sample) {
      begin_backward<S, kFused>(args, statistic, mean, table.of(sample));
    });
  });
  run_phases(
      plan, units.tasks(), parallel,
      [&](int64_t task, int64_t part) {
        const int64_t sample = units.sample(task);
        const Reduce op{call.gradient, mean + sample * view.channels, table.base(sample), all.columns(), call.kept};
        reduce_wide(op, call.channels, units(task, part), all.of(sample, part % plan.splits));
      },
      [&](int64_t task) {
        for_each_statistic(task, [&](int64_t statistic, int64_t sample) {
          const ResultTable results = all.of(sample, 0);
          const int64_t column = all.column(sample), first = column + statistic % view.groups * view.width();
          const Reduce op{call.gradient, nullptr, nullptr, 0};
          merge_ranges(op, view.inner, plan, results, first, first + view.width());
          finish_group_backward(args, statistic, results, column, table.of(sample));
        });
      },
      [&](int64_t task, int64_t part) { call.apply_to(units(task, part), table.base(units.sample(task))); });
  write_parameter_gradient(all, 0, args.grad_bias, parallel);
  write_parameter_gradient(all, 1, args.grad_weight, parallel);
}

template <class T>
void group_norm_backward(const GroupNormBackward& args, const Parallel& parallel) {
  dispatch_fused(args.fused(), [&](auto fused) { group_norm_backward<T, fused()>(args, parallel); });
}

}  // namespace
}  // namespace normfused::cpu::NF_ISA
