// The finish of a channel's statistics: which batches update the running statistics, and which are counted in
// nonfinite_batches.
#pragma once

#include "kernels/math.h"
#include "values.h"

namespace normfused::testing {

// One channel of each kind. The values are float64, whose squares can overflow.
enum HardChannel { kOrdinary, kConstant, kInfiniteVariance, kInfiniteMean, kNaN, kHardChannels };

inline double hard_value(int64_t channel, int64_t m) {
  const double sign = m % 2 == 0 ? 1 : -1;
  switch (channel) {
    case kConstant:
      return 0.1;
    case kInfiniteVariance:
      return std::ldexp(sign, 700);
    case kInfiniteMean:
      return m == 3 ? std::numeric_limits<double>::infinity() : sign;
    case kNaN:
      return m == 5 ? std::nan("") : sign;
    default:
      return 2 + 0.5 * sign;
  }
}

struct HardStatistics {
  double mean, variance;
};

// For an even number of values. A rank can send a finite deviation with an infinite mean.
inline HardStatistics hard_statistics(int64_t channel, bool of_ranks) {
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::nan("");
  const HardStatistics of[] = {{2, 0.25}, {0.1, 0}, {0, infinity}, {infinity, of_ranks ? 0.25 : nan}, {nan, nan}};
  return of[channel];
}

// Which buffers a call updates.
struct Updated {
  bool mean, var, nonfinite_batches;
};

inline void expect_finished(const BatchStatistics& args, int64_t positions, bool of_ranks, const Updated& updated,
                            const std::vector<double>& running_mean, const std::vector<double>& running_var,
                            const std::vector<int64_t>& nonfinite_batches) {
  const auto count = static_cast<double>(positions);
  for (int64_t c = 0; c < kHardChannels; ++c) {
    const auto [mean, variance] = hard_statistics(c, of_ranks);
    const bool skips = updated.nonfinite_batches && c != kOrdinary && c != kConstant;
    expect_near("mean", c, args.mean[c], mean, 0);
    expect_near("invstd", c, args.invstd[c], 1 / std::sqrt(variance), 0);
    expect_near("nonfinite_batches", c, static_cast<double>(nonfinite_batches[c]), skips ? 8 : 7, 0);
    const double unbiased = variance * count / (count - 1);
    expect_near("running_mean", c, running_mean[c], updated.mean && !skips ? 0.75 * 3 + 0.25 * mean : 3, 1e-15);
    expect_near("running_var", c, running_var[c], updated.var && !skips ? 0.75 * 5 + 0.25 * unbiased : 5, 1e-15);
  }
}

// The words of two ranks; the second has no values.
inline std::vector<int64_t> hard_messages(int64_t count, int64_t stride) {
  std::vector<int64_t> words(2 * stride);
  words[0] = count;
  auto* const moments = reinterpret_cast<RankMoments<double>*>(words.data() + 1);
  for (int64_t c = 0; c < kHardChannels; ++c)
    moments[c] = {hard_statistics(c, true).mean, std::sqrt(hard_statistics(c, true).variance)};
  return words;
}

// Calls the kernel that finishes statistics. `source` is "channels first" or "channels last", one tensor of `count`
// values per channel, or "ranks".
template <class Backend>
void finish_hard_statistics(Backend& backend, const BatchStatistics& statistics, const std::string& source,
                            int64_t count) {
  if (source == "ranks") {
    const int64_t stride = rank_words(kHardChannels, DType::kFloat64);
    const std::vector<int64_t> words = hard_messages(count, stride);
    int64_t total;
    backend.merge_ranks(MergeRanks{statistics, 2, kHardChannels, true, words.data(), stride, &total});
    return;
  }
  const int64_t inner = source == "channels first" ? 12 : 1;
  Buffer<double> input(count * kHardChannels, 0), output(count * kHardChannels, 0);
  for (int64_t c = 0; c < kHardChannels; ++c)
    for (int64_t m = 0; m < count; ++m)
      input.data[(m / inner * kHardChannels + c) * inner + m % inner] = hard_value(c, m);
  BatchNormForward forward{};
  static_cast<BatchStatistics&>(forward) = statistics;
  forward.view = {count / inner, kHardChannels, inner};
  forward.dtype = DType::kFloat64;
  forward.input = input.data;
  forward.output = output.data;
  backend.batch_norm_training(forward);
}

// With eps = 0.
template <class Backend>
void run_finish(Backend& backend) {
  constexpr int64_t kCount = 24;
  for (const Updated& updated : {Updated{true, true, true}, Updated{false, false, true}, Updated{true, false, true},
                                 Updated{false, true, true}, Updated{true, true, false}}) {
    for (const std::string source : {"channels first", "channels last", "ranks"}) {
      current = backend.name() + " finish of " + source + (updated.mean ? ", running mean" : "") +
                (updated.var ? ", running var" : "") + (updated.nonfinite_batches ? ", skipping" : "");
      std::vector<double> running_mean(kHardChannels, 3), running_var(kHardChannels, 5), mean(kHardChannels),
          invstd(kHardChannels);
      std::vector<int64_t> nonfinite_batches(kHardChannels, 7);
      BatchStatistics statistics{};
      if (updated.mean) statistics.running_mean = {running_mean.data(), DType::kFloat64};
      if (updated.var) statistics.running_var = {running_var.data(), DType::kFloat64};
      if (updated.nonfinite_batches) statistics.nonfinite_batches = nonfinite_batches.data();
      statistics.momentum = 0.25;
      statistics.mean = mean.data();
      statistics.invstd = invstd.data();
      finish_hard_statistics(backend, statistics, source, kCount);
      expect_finished(statistics, kCount, source == "ranks", updated, running_mean, running_var, nonfinite_batches);
    }
  }
}

}  // namespace normfused::testing
