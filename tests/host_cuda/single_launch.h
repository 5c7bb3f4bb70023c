// Batch norm and norms of rows in one launch, which stages a tile or a row in shared memory: with exactly as much
// shared memory as a plan needs, and with one byte less.
#pragma once

#include <map>

#include "definition.h"
#include "group_norm.h"
#include "layer_norm.h"
#include "resources.h"

namespace normfused::testing {

inline int max_cluster = 1;           // of the devices
inline int64_t cluster_launches = 0;  // that took place

// Runs operations and records the fewest launches that each took.
struct FewestLaunches {
  cuda::DeviceLimits limits;
  mutable unsigned training = ~0u, backward = ~0u, rows = ~0u, groups = ~0u, other = ~0u;

  std::string name() const { return "cuda with " + std::to_string(limits.shared_bytes) + " bytes of shared memory"; }

  void batch_norm_training(const BatchNormForward& args) const { run(cuda::batch_norm_training, args, training); }
  void batch_norm_backward(const BatchNormBackward& args) const { run(cuda::batch_norm_backward, args, backward); }
  void batch_norm_inference(const BatchNormForward& args) const { run(cuda::batch_norm_inference, args, other); }
  void group_norm(const GroupNormForward& args) const { run(cuda::group_norm, args, rows); }
  void group_norm_backward(const GroupNormBackward& args) const { run(cuda::group_norm_backward, args, groups); }
  void layer_norm(const LayerNormForward& args) const { run(cuda::layer_norm, args, rows); }
  void layer_norm_backward(const LayerNormBackward& args) const { run(cuda::layer_norm_backward, args, other); }

 private:
  template <class Args>
  void run(cudaError_t (*kernel)(const Args&, cuda::Resources&), const Args& args, unsigned& fewest) const {
    HostResources resources(limits);
    const unsigned before = cudahost::launches;
    try {
      if (kernel(args, resources) != cudaSuccess) throw std::runtime_error("the launch failed");
      cluster_launches += cudahost::running.config.cluster > 1;
      if (!resources.tickets_are_zero()) throw std::runtime_error("a ticket is not zero after the launch");
    } catch (const std::exception& error) {
      std::printf("FAILED %s: %s\n", current.c_str(), error.what());
      std::exit(1);
    }
    fewest = std::min(fewest, cudahost::launches - before);
  }
};

inline constexpr int64_t kMostShared = 227 << 10;

inline cuda::DeviceLimits with_shared(int64_t bytes) { return {1, int64_t{1} << 40, false, bytes, max_cluster}; }

// The least shared memory with which is_single(limits) is true; more than kMostShared if there is none.
template <class IsSingle>
int64_t least_shared(const IsSingle& is_single) {
  int64_t low = 0, high = kMostShared + 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    is_single(with_shared(middle)) ? high = middle : low = middle + 1;
  }
  return high;
}

// Runs an operation at its limit, where it takes at most `launches` launches, and one byte below it, where it takes
// more. `fewest`: the operation's counter. Returns whether it can be single at all.
template <class Run>
bool run_at_limit(const char* what, int64_t least, unsigned FewestLaunches::* fewest, const Run& run,
                  unsigned launches = 1) {
  const std::string name = current;
  for (const int64_t shared : {std::min(least, kMostShared), least - 1}) {
    current = name + " " + what + " with " + std::to_string(shared) + " of " + std::to_string(least) + " bytes";
    const FewestLaunches backend{with_shared(shared)};
    run(backend);
    if ((backend.*fewest <= launches) != (shared >= least)) {
      std::printf("FAILED %s: %u launches\n", current.c_str(), backend.*fewest);
      std::exit(1);
    }
  }
  current = name;
  return least <= kMostShared;
}

// Batch norm of one tensor.
template <class T>
struct SingleBatchNorm {
  const std::string name;
  const Case<T> data;
  const Statistics<T> statistics;
  const int64_t offset;

  SingleBatchNorm(const ChannelView& view, int64_t offset, std::mt19937& random)
      : name(std::string(Format<T>::name) + " outer " + std::to_string(view.outer) + " channels " +
             std::to_string(view.channels) + " inner " + std::to_string(view.inner) + " offset " +
             std::to_string(offset)),
        data(view, offset, random),
        statistics(data),
        offset(offset) {}

  // Calls test(what, reduced, counter, run) for each operation, plain and fused, forward and backward: what its launch
  // reads, the counter of its launches, and a function that runs it on a FewestLaunches.
  template <class Test>
  void for_each(std::mt19937& random, const Test& test) const {
    constexpr int kSize = sizeof(T);
    const bool aligned = offset == 0;
    const auto with_case = [&](const auto& run) {
      return [&, run](const FewestLaunches& backend) {
        BatchNormCase<T, const FewestLaunches> batch_norm(backend, data, statistics, offset);
        run(backend, batch_norm);
      };
    };
    test("training", cuda::Reduced{kSize, 1, aligned, true}, &FewestLaunches::training,
         with_case([](const auto&, auto& batch_norm) { batch_norm.run_training(); }));
    test("backward", cuda::Reduced{kSize, 2, aligned, true}, &FewestLaunches::backward,
         with_case([](const auto&, auto& batch_norm) { batch_norm.run_backward(); }));
    for (const bool residual : {false, true})
      for (const bool mask : {false, true}) {
        const Fusion fusion{{mask ? ActivationKind::kRelu : ActivationKind::kSilu, 0}, residual, mask};
        const auto fused = with_case([&, fusion](const FewestLaunches& backend, auto& batch_norm) {
          const AffineStatistics channels{batch_norm.mean, batch_norm.invstd, batch_norm.weight(), batch_norm.bias()};
          const BatchNormForward forward = batch_norm.forward_with_batch_statistics();
          run_fused(backend, fusion, data, forward, offset, channels, random);
        });
        cuda::Reduced forward{kSize, residual ? 2 : 1, aligned, true, mask, cuda::kMaxValues};
        if (kSize == sizeof(double)) forward.may_apply = false;
        test("fused training", forward, &FewestLaunches::training, fused);
        const cuda::Reduced backward{kSize, residual && !mask ? 3 : 2, aligned, true};
        test("fused backward", backward, &FewestLaunches::backward, fused);
      }
  }
};

// Plain and fused, forward and backward. Adds to `counts` how many operations can be single.
template <class T>
void run_single(const ChannelView& view, int64_t offset, std::mt19937& random, std::map<std::string, int64_t>& counts) {
  const SingleBatchNorm<T> batch_norm(view, offset, random);
  batch_norm.for_each(random, [&](const char* what, const cuda::Reduced& reduced, auto fewest, const auto& run) {
    current = batch_norm.name;
    const int64_t least = least_shared(
        [&](const cuda::DeviceLimits& limits) { return cuda::plan_reduction(view, reduced, limits).single(); });
    const bool is_single = run_at_limit(what, least, fewest, run);
    ++counts[std::string(what) + (is_single ? " in one launch" : " in several")];
  });
}

// Group and layer norm whose rows of `count` values exceed the registers.
template <class T>
void run_staged_rows(int64_t channels, int64_t inner, std::mt19937& random, std::map<std::string, int64_t>& counts) {
  const GroupView view{2, 1, channels, inner, false};
  const ChannelView rows{2, view.count(), 1};
  const auto run = [&](const char* what, const cuda::ResidentRows& shape, const auto& norm) {
    const int64_t least = least_shared(
        [&](const cuda::DeviceLimits& limits) { return cuda::plan_resident_rows(shape, false, limits).is_staged; });
    current = std::string(what) + " " + Format<T>::name + " of " + std::to_string(view.count()) + " values";
    const bool is_single = run_at_limit(what, least, &FewestLaunches::rows, norm);
    ++counts[std::string(what) + (is_single ? " in one launch" : " in several")];
  };
  const int values = cuda::values_per_access(sizeof(T));
  for (const Fusion& fusion : {Fusion{{}, false, false}, Fusion{{ActivationKind::kSilu, 0}, false, false},
                               Fusion{{ActivationKind::kRelu, 0}, true, true}})
    run("group norm",
        cuda::rows_of(view, sizeof(T),
                      fusion.mask || fusion.activation.kind != ActivationKind::kIdentity ? cuda::kMaxValues : values,
                      true),
        [&](const FewestLaunches& backend) {
          GroupNormCase<T, const FewestLaunches>(backend, view, fusion, false, 0, random).run();
        });
  run("layer norm", cuda::rows_of(rows, 1, sizeof(T), true, true), [&](const FewestLaunches& backend) {
    LayerNormCase<T, const FewestLaunches>(backend, rows, {1, false, true, false}, 0, random).run();
  });
}

// Backward of group norm, in one launch and two that add up the parameter gradients of the samples; and forward, if it
// is channels last.
template <class T>
void run_together(const GroupView& view, std::mt19937& random, std::map<std::string, int64_t>& counts) {
  const std::string layout = view.channels_last ? "group norm of columns" : "group norm";
  for (const Fusion& fusion : {Fusion{{}, false, false}, Fusion{{ActivationKind::kSilu, 0}, true, false},
                               Fusion{{ActivationKind::kRelu, 0}, true, true}}) {
    const auto test = [&](const char* what, cuda::Reduced reduced, auto fewest, unsigned launches) {
      reduced.together = view.width();
      const int64_t least = least_shared([&](const cuda::DeviceLimits& limits) {
        return cuda::plan_reduction(view.by_sample(), reduced, limits).single();
      });
      current = layout + " " + Format<T>::name + " channels " + std::to_string(view.channels) + " groups " +
                std::to_string(view.groups) + " inner " + std::to_string(view.inner);
      const auto run = [&](const FewestLaunches& backend) {
        GroupNormCase<T, const FewestLaunches>(backend, view, fusion, false, 0, random).run();
      };
      const bool is_single = run_at_limit(what, least, fewest, run, launches);
      ++counts[layout + " " + what + (is_single ? " in one launch" : " in several")];
    };
    test("backward", {sizeof(T), fusion.residual ? 3 : 2, true, true}, &FewestLaunches::groups, 3);
    if (!view.channels_last) continue;
    cuda::Reduced forward{sizeof(T), fusion.residual ? 2 : 1, true, true, fusion.mask};
    const bool is_fused = fusion.residual || fusion.activation.kind != ActivationKind::kIdentity;
    if (is_fused) forward.values = cuda::kMaxValues;
    if (is_fused && sizeof(T) == sizeof(double)) forward.may_apply = false;
    test("forward", forward, &FewestLaunches::rows, 1);
  }
}

// --- pipelined launches

// Every step of an order exists once; a tile is applied after all of its splits are reduced, and `window` or fewer
// tiles later.
inline void check_steps() {
  cuda::RowsPlan plan{};
  for (plan.tiles = 1; plan.tiles <= 9; ++plan.tiles)
    for (plan.window = 1; plan.window <= plan.tiles; ++plan.window)
      for (plan.splits = 1; plan.splits <= 3; ++plan.splits) {
        std::vector<int> reduced(plan.tiles), applied(plan.tiles);
        for (int64_t number = 0; number < plan.steps(); ++number) {
          const cuda::PipelineStep step = plan.step(static_cast<uint32_t>(number));
          auto& done = step.applies ? applied : reduced;
          const bool is_next = done.at(static_cast<size_t>(step.tile))++ == step.split && step.split < plan.splits;
          const auto is_done = [&](int splits) { return splits == plan.splits; };
          const auto waiting = std::count_if(reduced.begin(), reduced.end(), is_done) -
                               std::count_if(applied.begin(), applied.end(), is_done);
          if (!is_next || (step.applies && !is_done(reduced[static_cast<size_t>(step.tile)])) ||
              waiting > plan.window + 1) {
            std::printf("FAILED step %d of %d tiles, window %d\n", static_cast<int>(number),
                        static_cast<int>(plan.tiles), static_cast<int>(plan.window));
            std::exit(1);
          }
        }
        if (std::min(*std::min_element(applied.begin(), applied.end()),
                     *std::min_element(reduced.begin(), reduced.end())) != plan.splits) {
          std::printf("FAILED: a step is missing\n");
          std::exit(1);
        }
      }
}

// Runs each operation on devices with the least and the most L2 cache for which its launch is pipelined, and with one
// byte less and more, with which it is not.
template <class T>
void run_pipelined(const ChannelView& view, std::mt19937& random, std::map<std::string, int64_t>& counts) {
  const SingleBatchNorm<T> batch_norm(view, 0, random);
  batch_norm.for_each(random, [&](const char* what, const cuda::Reduced& reduced, auto fewest, const auto& run) {
    const auto with_cache = [](int64_t bytes) { return cuda::DeviceLimits{1, bytes, false, 0}; };
    const auto is_pipelined = [&](int64_t bytes) {
      return cuda::plan_reduction(view, reduced, with_cache(bytes)).pipelined();
    };
    const int64_t most = view.numel() * reduced.itemsize * reduced.inputs / 2;
    int64_t least = 0, high = most;
    while (least < high) {
      const int64_t middle = (least + high) / 2;
      is_pipelined(middle) ? high = middle : least = middle + 1;
    }
    if (reduced.may_apply != is_pipelined(least)) {
      std::printf("FAILED %s %s: no device pipelines it\n", batch_norm.name.c_str(), what);
      std::exit(1);
    }
    for (const int64_t bytes : {least - 1, least, most, most + 1}) {
      current = batch_norm.name + " " + what + " with " + std::to_string(bytes) + " bytes of L2 cache";
      const FewestLaunches backend{with_cache(bytes)};
      run(backend);
      const bool expected = reduced.may_apply && bytes >= least && bytes <= most;
      if (backend.*fewest != (expected ? 1 : 2)) {
        std::printf("FAILED %s: %u launches\n", current.c_str(), backend.*fewest);
        std::exit(1);
      }
      ++counts[std::string(what) + (expected ? " pipelined" : " in several")];
    }
  });
}

// Tiles of one channel, and of several with a last one that is not full.
inline void run_pipelined_launches(std::mt19937& random) {
  check_steps();
  std::map<std::string, int64_t> counts;
  for (const ChannelView& view : {ChannelView{1, 24, 8400}, ChannelView{2, 165, 512}}) {
    run_pipelined<float>(view, random, counts);
    run_pipelined<double>(view, random, counts);
    run_pipelined<Half>(view, random, counts);
    run_pipelined<BFloat16>(view, random, counts);
  }
  for (const auto& [what, times] : counts)
    std::printf("  %-34s %5lld cases\n", what.c_str(), static_cast<long long>(times));
}

// --- persistent launches

// Runs each operation on devices with the least and the most shared memory for which its launch is persistent, and with
// one byte less; and with the largest L2 cache for which it is, and with one byte more.
template <class T>
void run_persistent(const ChannelView& view, int multiprocessors, std::mt19937& random,
                    std::map<std::string, int64_t>& counts) {
  const SingleBatchNorm<T> batch_norm(view, 0, random);
  batch_norm.for_each(random, [&](const char* what, const cuda::Reduced& reduced, auto fewest, const auto& run) {
    const int64_t cache = view.numel() * reduced.itemsize * reduced.inputs * 2 - 1;
    const auto device = [&](int64_t shared, int64_t l2_bytes) {
      return cuda::DeviceLimits{multiprocessors, l2_bytes, false, shared};
    };
    const int64_t least = least_shared([&](const cuda::DeviceLimits& limits) {
      return cuda::plan_reduction(view, reduced, device(limits.shared_bytes, cache)).persistent();
    });
    if (reduced.may_apply != (least <= kMostShared)) {
      std::printf("FAILED %s %s: no device has a persistent launch\n", batch_norm.name.c_str(), what);
      std::exit(1);
    }
    const int64_t enough = std::min(least, kMostShared);
    for (const auto& [shared, l2_bytes] :
         {std::pair{enough - 1, cache}, {enough, cache}, {kMostShared, cache}, {kMostShared, cache + 1}}) {
      current = batch_norm.name + " " + what + " with " + std::to_string(shared) + " bytes of shared memory";
      const FewestLaunches backend{device(shared, l2_bytes)};
      run(backend);
      const bool expected = shared >= least && l2_bytes == cache;
      if (backend.*fewest != (expected ? 1 : 2)) {
        std::printf("FAILED %s: %u launches\n", current.c_str(), backend.*fewest);
        std::exit(1);
      }
      ++counts[std::string(what) + (expected ? " persistent" : " in several")];
    }
  });
}

// Columns that are plain, in one tile and several, repeated, end inside a row, and folded. No launch is single: even
// the narrowest tile, of `tile_bytes` bytes per row, does not fit shared memory, or there are too few for the device.
inline void run_persistent_launches(std::mt19937& random) {
  std::map<std::string, int64_t> counts;
  const auto run = [&](auto value, int64_t channels, int64_t inner, int64_t tile_bytes, int64_t bytes, int for_each) {
    using T = decltype(value);
    const int64_t row = channels * inner * static_cast<int64_t>(sizeof(T)), tiles = (row + tile_bytes - 1) / tile_bytes;
    run_persistent<T>({tiles * bytes / row, channels, inner}, static_cast<int>(tiles) * for_each, random, counts);
  };
  const auto run_all = [&](int64_t channels, int64_t inner, int64_t tile_bytes, int64_t bytes, int for_each) {
    run(float{}, channels, inner, tile_bytes, bytes, for_each);
    run(double{}, channels, inner, tile_bytes, bytes, for_each);
    run(Half{}, channels, inner, tile_bytes, bytes, for_each);
    run(BFloat16{}, channels, inner, tile_bytes, bytes, for_each);
  };
  run(float{}, 8, 1, 32, 240000, 2);  // several splits for each block
  run_all(8, 1, 32, 40000, 4);
  run_all(24, 1, 32, 40000, 4);
  run_all(3, 1, 1000, 40000, 4);
  run_all(65, 1, 1000, 40000, 4);
  run_all(8, 7, 1000, 140000, 30);
  for (const auto& [what, times] : counts)
    std::printf("  %-34s %5lld cases\n", what.c_str(), static_cast<long long>(times));
}

// The same for rows that only the shared memory of a cluster holds.
inline void run_refused_rows(const cuda::DeviceLimits& limits, std::mt19937& random) {
  const FewestLaunches groups{limits}, layers{limits};
  GroupNormCase<float, const FewestLaunches>(groups, {2, 1, 2, 8400, false}, {{}, false, false}, false, 0, random)
      .run();
  LayerNormCase<float, const FewestLaunches>(layers, {2, 16800, 1}, {1, false, true, false}, 0, random).run();
  if (groups.rows != 3 || layers.rows != 2) {
    std::printf("FAILED %s: %u and %u launches for rows\n", current.c_str(), groups.rows, layers.rows);
    std::exit(1);
  }
}

// A device that refuses clusters runs the plan for several launches.
inline void run_refused(std::mt19937& random) {
  const Case<float> data({8, 3, 640}, 0, random);
  const Statistics<float> statistics(data);
  const GroupView view{2, 2, 6, 640, false};
  cudahost::max_cluster = 1;
  current = "refused clusters";
  const FewestLaunches backend{{1, int64_t{1} << 40, false, 16 << 10, 8}};
  BatchNormCase<float, const FewestLaunches> batch_norm(backend, data, statistics, 0);
  batch_norm.run_training();
  batch_norm.run_backward();
  GroupNormCase<float, const FewestLaunches>(backend, view, {{}, false, false}, false, 0, random).run();
  if (backend.training != 2 || backend.backward != 2 || backend.groups < 4) {
    std::printf("FAILED %s: %u, %u, %u launches\n", current.c_str(), backend.training, backend.backward,
                backend.groups);
    std::exit(1);
  }
  run_refused_rows(backend.limits, random);
  cudahost::max_cluster = ~0u;
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
    if (view.numel() > 8000 || view.channels > 1000) continue;  // slow in the simulator
    run_single<double>(view, 0, random, counts);
    run_single<BFloat16>(view, 0, random, counts);
    run_single<float>(view, 1, random, counts);
  }
  for (const auto& [channels, inner] :
       {std::pair{2, 8400}, {4, 4502}, {6, 2804}}) {  // the second: vectors of two channels
    run_staged_rows<float>(channels, inner, random, counts);
    run_staged_rows<double>(channels, inner, random, counts);
    run_staged_rows<Half>(channels, inner, random, counts);
    run_staged_rows<BFloat16>(channels, inner, random, counts);
  }
  // Groups of one channel, of as many as a block has warps, of more, of a number that does not divide the threads.
  // Channels last: groups that are parts of vectors, or whole ones, and some that end inside a vector.
  for (const GroupView& view : {GroupView{3, 5, 5, 49, false},
                                {2, 4, 12, 64, false},
                                {2, 4, 40, 36, false},
                                {1, 1, 130, 16, false},
                                {2, 1, 7, 1000, false},
                                {1, 1, 300, 16, false},
                                {2, 2, 6, 1, false},
                                {2, 4, 16, 49, true},
                                {2, 4, 40, 36, true},
                                {3, 8, 8, 64, true},
                                {1, 1, 130, 16, true},
                                {2, 2, 64, 300, true},
                                {1, 1, 2048, 4, true},
                                {2, 3, 24, 1, true}}) {
    run_together<float>(view, random, counts);
    run_together<double>(view, random, counts);
    run_together<Half>(view, random, counts);
    run_together<BFloat16>(view, random, counts);
  }
  if (max_cluster > 1) run_refused(random);
  std::printf("  %lld launches of clusters\n", static_cast<long long>(cluster_launches));
  if ((cluster_launches > 0) != (max_cluster > 1)) std::exit(1);
  for (const auto& [what, times] : counts)
    std::printf("  %-34s %5lld cases\n", what.c_str(), static_cast<long long>(times));
}

}  // namespace normfused::testing
