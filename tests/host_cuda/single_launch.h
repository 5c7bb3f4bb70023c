// Batch norm in one launch, which keeps a tile in shared memory: with exactly as much shared memory as a plan needs,
// and with one byte less.
#pragma once

#include <map>

#include "definition.h"
#include "resources.h"

namespace normfused::testing {

// Runs batch norm and records the fewest launches that each operation took.
struct FewestLaunches {
  cuda::DeviceLimits limits;
  mutable unsigned training = ~0u, backward = ~0u;

  std::string name() const { return "cuda with " + std::to_string(limits.shared_bytes) + " bytes of shared memory"; }

  void batch_norm_training(const BatchNormForward& args) const { run(cuda::batch_norm_training, args, training); }
  void batch_norm_backward(const BatchNormBackward& args) const { run(cuda::batch_norm_backward, args, backward); }
  void batch_norm_inference(const BatchNormForward& args) const {
    unsigned any = 0;
    run(cuda::batch_norm_inference, args, any);
  }

 private:
  template <class Args>
  void run(cudaError_t (*kernel)(const Args&, cuda::Resources&), const Args& args, unsigned& fewest) const {
    HostResources resources(limits);
    const unsigned before = cudahost::launches;
    try {
      if (kernel(args, resources) != cudaSuccess) throw std::runtime_error("the launch failed");
      if (!resources.tickets_are_zero()) throw std::runtime_error("a ticket is not zero after the launch");
    } catch (const std::exception& error) {
      std::printf("FAILED %s: %s\n", current.c_str(), error.what());
      std::exit(1);
    }
    fewest = std::min(fewest, cudahost::launches - before);
  }
};

inline constexpr int64_t kMostShared = 227 << 10;

// The least shared memory with which a plan is single; more than kMostShared if there is none.
inline int64_t least_shared(const ChannelView& view, const cuda::Reduced& reduced) {
  int64_t low = 0, high = kMostShared + 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const cuda::DeviceLimits limits{1, int64_t{1} << 40, false, middle};
    cuda::plan_reduction(view, reduced, limits).single() ? high = middle : low = middle + 1;
  }
  return high;
}

// Runs an operation at its limit, where it takes one launch, and one byte below it. `fewest`: the operation's counter.
// Returns whether it can be single at all.
template <class Run>
bool run_at_limit(const char* what, int64_t least, unsigned FewestLaunches::* fewest, const Run& run) {
  const std::string name = current;
  for (const int64_t shared : {std::min(least, kMostShared), least - 1}) {
    current = name + " " + what + " with " + std::to_string(shared) + " of " + std::to_string(least) + " bytes";
    const FewestLaunches backend{{1, int64_t{1} << 40, false, shared}};
    run(backend);
    if ((backend.*fewest == 1) != (shared >= least)) {
      std::printf("FAILED %s: %u launches\n", current.c_str(), backend.*fewest);
      std::exit(1);
    }
  }
  current = name;
  return least <= kMostShared;
}

// Plain and fused, forward and backward. Adds to `counts` how many operations can be single.
template <class T>
void run_single(const ChannelView& view, int64_t offset, std::mt19937& random, std::map<std::string, int64_t>& counts) {
  const std::string name = std::string(Format<T>::name) + " outer " + std::to_string(view.outer) + " channels " +
                           std::to_string(view.channels) + " inner " + std::to_string(view.inner) + " offset " +
                           std::to_string(offset);
  const Case<T> data(view, offset, random);
  const Statistics<T> statistics(data);
  const bool aligned = offset == 0;
  const auto count = [&](const char* what, bool is_single) {
    ++counts[std::string(what) + (is_single ? " in one launch" : " in several")];
  };
  const auto at_limit = [&](const char* what, const cuda::Reduced& reduced, unsigned FewestLaunches::* fewest,
                            const auto& run) {
    current = name;
    count(what, run_at_limit(what, least_shared(view, reduced), fewest, [&](const FewestLaunches& backend) {
            BatchNormCase<T, const FewestLaunches> batch_norm(backend, data, statistics, offset);
            run(backend, batch_norm);
          }));
  };
  constexpr int kSize = sizeof(T);
  at_limit("training", {kSize, 1, aligned, true}, &FewestLaunches::training,
           [&](const auto&, auto& batch_norm) { batch_norm.run_training(); });
  at_limit("backward", {kSize, 2, aligned, true}, &FewestLaunches::backward,
           [&](const auto&, auto& batch_norm) { batch_norm.run_backward(); });

  for (const bool residual : {false, true})
    for (const bool mask : {false, true}) {
      const Fusion fusion{{mask ? ActivationKind::kRelu : ActivationKind::kSilu, 0}, residual, mask};
      const auto fused = [&](const FewestLaunches& backend, auto& batch_norm) {
        const AffineStatistics channels{batch_norm.mean, batch_norm.invstd, batch_norm.weight(), batch_norm.bias()};
        const BatchNormForward forward = batch_norm.forward_with_batch_statistics();
        run_fused(backend, fusion, data, forward, offset, channels, random);
      };
      const int inputs = residual ? 2 : 1;
      cuda::Reduced forward{kSize, inputs, aligned, true, mask, cuda::kMaxValues};
      if (kSize == sizeof(double)) forward.may_apply = false;
      at_limit("fused training", forward, &FewestLaunches::training, fused);
      const cuda::Reduced backward{kSize, residual && !mask ? 3 : 2, aligned, true};
      at_limit("fused backward", backward, &FewestLaunches::backward, fused);
    }
}

// Rows that are whole, masked, of several vectors per thread; columns that are plain, repeated, folded and end inside a
// row; one channel and many.
inline void run_single_launches(std::mt19937& random) {
  std::map<std::string, int64_t> counts;
  for (const ChannelView& view : {ChannelView{8, 3, 64},
                                  {3, 5, 49},
                                  {5, 8, 49},
                                  {2, 65, 36},
                                  {1, 1, 9000},
                                  {3, 1, 7001},
                                  {200, 64, 1},
                                  {1001, 3, 1},
                                  {31, 65, 1},
                                  {3, 2049, 1},
                                  {2, 2049, 4}}) {
    run_single<float>(view, 0, random, counts);
    run_single<Half>(view, 0, random, counts);
    if (view.numel() > 8000) continue;  // slow in the simulator
    run_single<double>(view, 0, random, counts);
    run_single<BFloat16>(view, 0, random, counts);
    run_single<float>(view, 1, random, counts);
  }
  for (const auto& [what, times] : counts)
    std::printf("  %-34s %5lld cases\n", what.c_str(), static_cast<long long>(times));
}

}  // namespace normfused::testing
