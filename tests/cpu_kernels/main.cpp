// Runs all CPU kernels, without torch, over shapes, dtypes and alignments, and compares them with their definition in
// double. Buffers have the exact size, so sanitizers detect every access out of bounds. Prints the instruction set and
// the number of cases.
#include <thread>

#include "definition.h"
#include "every_value.h"
#include "group_norm.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/nontemporal.h"
#include "kernels/cpu/plan.h"
#include "layer_norm.h"
#include "value_counts.h"

// Replaces nontemporal.cpp: on any machine, non-temporal stores are used for outputs that are small enough for a test.
int64_t normfused::cpu::nontemporal_threshold(int64_t) { return 256 << 10; }

using namespace normfused;
using namespace normfused::testing;

namespace {

// Always three threads, so that splits run in parallel on any machine.
const cpu::Parallel kThreads{[](int64_t tasks, int64_t grain, cpu::Parallel::Body body, const void* context) {
  const int64_t chunk = std::max(grain, (tasks + 2) / 3);
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < tasks; begin += chunk)
    threads.emplace_back(body, context, begin, std::min(begin + chunk, tasks));
  for (std::thread& thread : threads) thread.join();
}};

struct Cpu {
  std::string name() const { return cpu::capability(); }
  void batch_norm_training(const BatchNormForward& args) { cpu::batch_norm_training(args, kThreads); }
  void batch_norm_inference(const BatchNormForward& args) { cpu::batch_norm_inference(args, kThreads); }
  void batch_norm_backward(const BatchNormBackward& args) { cpu::batch_norm_backward(args, kThreads); }
  void channel_moments(const ChannelStats& args) const { cpu::channel_moments(args, kThreads); }
  void channel_sums(const ChannelStats& args) { cpu::channel_sums(args, kThreads); }
  void integer_sums(const IntegerSums& args) { cpu::integer_sums(args, kThreads); }
  void pack_moments(const PackMoments& args) { cpu::pack_moments(args, kThreads); }
  void merge_ranks(const MergeRanks& args) { cpu::merge_ranks(args, kThreads); }
  void standardize(const Standardize& args) { cpu::standardize(args, kThreads); }
  void local_response_norm(const LocalResponseNorm& args) { cpu::local_response_norm(args, kThreads); }
  void group_norm(const GroupNormForward& args) { cpu::group_norm(args, kThreads); }
  void group_norm_backward(const GroupNormBackward& args) { cpu::group_norm_backward(args, kThreads); }
  void layer_norm(const LayerNormForward& args) { cpu::layer_norm(args, kThreads); }
  void layer_norm_backward(const LayerNormBackward& args) { cpu::layer_norm_backward(args, kThreads); }
};

// The load of the busiest of `threads` threads, relative to an even distribution, in the reduction or if it `applies`
// the results.
double load_of_the_busiest(const ChannelView& view, const cpu::Plan& plan, int64_t threads, bool applies) {
  const int64_t blocks = applies ? plan.apply_blocks() : 1, size = applies ? plan.apply_block : plan.position_block;
  const int64_t tasks = plan.units() * blocks;
  const int64_t chunk = std::max(cpu::grain(plan), (tasks + threads - 1) / threads);
  int64_t busiest = 0;
  for (int64_t begin = 0; begin < tasks; begin += chunk) {
    int64_t load = 0;
    for (int64_t task = begin; task < std::min(begin + chunk, tasks); ++task) {
      const int64_t unit = task / blocks;
      const int64_t c0 = unit % plan.channel_units * plan.channel_block;
      const int64_t m0 = unit / plan.channel_units * plan.position_block;
      const int64_t m1 = std::min(m0 + plan.position_block, view.positions());
      const int64_t length = std::clamp<int64_t>(m1 - m0 - task % blocks * size, 0, size);
      load += std::min(plan.channel_block, view.channels - c0) * length;
    }
    busiest = std::max(busiest, load);
  }
  return static_cast<double>(busiest * threads) / static_cast<double>(view.numel());
}

// Each batch norm of ResNet-50 is distributed evenly over two or four threads.
void run_shares() {
  const int64_t shapes[][2] = {{64, 112}, {64, 56},   {256, 56}, {128, 28}, {512, 28},
                               {256, 14}, {1024, 14}, {512, 7},  {2048, 7}};
  for (const auto& [channels, side] : shapes)
    for (const ChannelView& view : {ChannelView{32, channels, side * side}, ChannelView{32 * side * side, channels, 1}})
      for (const int64_t itemsize : {2, 4})
        for (const int64_t operands : {1, 2})
          for (const int64_t threads : {2, 4})
            for (const bool applies : {false, true})
              expect_near("share", channels,
                          load_of_the_busiest(view, cpu::plan_reduction(view, itemsize, operands), threads, applies), 1,
                          0.1);
}

// Channels first: rows shorter and longer than vectors and segments; few and many channels. Channels last: numbers of
// channels around the size of a vector, of several vectors and of a unit. Short rows in lane layout: too few of them,
// more than a segment, more channels than lanes, and units that end inside a row.
const ChannelView kViews[] = {
    {1, 1, 1},    {1, 1, 2},     {2, 3, 1},     {1, 3, 31},     {4, 3, 49},   {32, 65, 49},  {2, 130, 7},
    {3, 2, 4097}, {2, 3, 9000},  {5, 2049, 2},  {3, 40, 900},   {7, 16, 64},  {31, 1, 1},    {33, 65, 1},
    {700, 96, 1}, {900, 70, 1},  {3, 2049, 1},  {60, 1100, 1},  {4000, 3, 1}, {7, 40, 4},    {600, 40, 2},
    {9, 65, 16},  {5, 2100, 25}, {13001, 3, 3}, {1030, 200, 1}, {9, 70, 36},  {70, 11, 100},
};

// Each returns the number of cases that it ran.

int64_t run_floating(Cpu& backend, std::mt19937& random) {
  int64_t cases = 0;
  for (const ChannelView& view : kViews) {
    for (const int64_t offset : {0, 1}) {
      run<float>(backend, view, offset, random);
      run<BFloat16>(backend, view, offset, random);
    }
    run<double>(backend, view, 1, random);
    run<Half>(backend, view, 1, random);
    cases += 6;
  }
  return cases;
}

int64_t run_integers(Cpu& backend, std::mt19937& random) {
  int64_t cases = 0;
  for (const ChannelView& view : kViews)
    for (const int64_t offset : {0, 1}) {
      run_integer_sums<uint8_t>(backend, DType::kUInt8, view, offset, Integers::kAny, random);
      run_integer_sums<int8_t>(backend, DType::kInt8, view, offset, Integers::kAny, random);
      run_integer_sums<int16_t>(backend, DType::kInt16, view, offset, Integers::kAny, random);
      run_integer_sums<int32_t>(backend, DType::kInt32, view, offset, Integers::kAny, random);
      run_integer_sums<int64_t>(backend, DType::kInt64, view, offset, Integers::kAny, random);
      cases += 5;
    }
  // So many bytes that the sum of their squares exceeds 32 bits.
  run_integer_sums<uint8_t>(backend, DType::kUInt8, {1, 2, 140000}, 0, Integers::kMaximum, random);
  return cases + 1;
}

int64_t run_counts(std::mt19937& random) {
  int64_t cases = 0;
  for (const ChannelView& view : kViews)
    for (const int64_t offset : {0, 1}) {
      run_value_counts<uint8_t>(kThreads, DType::kUInt8, view, offset, random);
      ++cases;
      if (view.channels > 200 && (offset == 1 || view.inner > 2)) continue;  // slow: every channel has its own tables
      run_value_counts<int8_t>(kThreads, DType::kInt8, view, offset, random);
      run_value_counts<int16_t>(kThreads, DType::kInt16, view, offset, random);
      run_value_counts<int32_t>(kThreads, DType::kInt32, view, offset, random);
      run_value_counts<int64_t>(kThreads, DType::kInt64, view, offset, random);
      run_value_counts<float>(kThreads, DType::kFloat32, view, offset, random);
      run_value_counts<double>(kThreads, DType::kFloat64, view, offset, random);
      cases += 6;
    }
  // Several blocks.
  run_value_counts<uint8_t>(kThreads, DType::kUInt8, {2, 3, 250000}, 0, random);
  run_value_counts<float>(kThreads, DType::kFloat32, {250000, 3, 1}, 0, random);
  return cases + 2;
}

// Samples, groups, channels, positions. Several statistics in a task; parts of runs, of channels and of positions,
// which end inside of a row; more channels than a unit; one position; one channel per group; enough tasks for no
// division; channels last, ranges of groups.
int64_t run_groups(Cpu& backend, std::mt19937& random) {
  const int64_t shapes[][4] = {{1, 1, 1, 2},      {2, 3, 6, 35},    {40, 4, 12, 9},   {3, 2, 140, 49},
                               {1, 2, 6, 90000},  {2, 1, 70, 2100}, {33, 2, 4, 8},    {1, 1, 2, 300000},
                               {2, 2, 1100, 130}, {6, 4, 32, 1},    {2, 16, 16, 500}, {1, 32, 2080, 67},
                               {35, 1, 3, 60000}, {2, 32, 640, 50}, {3, 6, 96, 40}};
  int64_t cases = 0;
  for (const auto& [samples, groups, channels, inner] : shapes)
    for (const bool channels_last : {false, true})
      for (const int64_t offset : {0, 1}) {
        const GroupView view{samples, groups, channels, inner, channels_last};
        const bool is_large = view.numel() > 100000;  // definitions take long
        if (is_large && offset == 1) continue;
        run_group_norm<float>(backend, view, offset, random);
        ++cases;
        if (is_large) continue;
        run_group_norm<BFloat16>(backend, view, offset, random);
        run_group_norm<double>(backend, view, offset, random);
        run_group_norm<Half>(backend, view, offset, random);
        cases += 3;
      }
  return cases;
}

// Outer indices, channels, inner, samples. Rows: of one value, shorter than a vector, with a tail, several chunks that
// end in a group of rows, more rows than are added in S, rows with parts in backward, rows with parts in forward too.
// Columns: shorter than a vector, one block, several blocks, more channels than are added in S, several chunks.
int64_t run_layers(Cpu& backend, std::mt19937& random) {
  const int64_t shapes[][4] = {{5, 1, 1, 1},    {9, 5, 1, 3},     {70, 32, 1, 2},   {333, 47, 1, 1},   {150, 768, 1, 3},
                               {6, 4100, 1, 2}, {3, 20000, 1, 1}, {4, 70001, 1, 2}, {2, 300000, 1, 1}, {4, 3, 2, 2},
                               {2, 70, 49, 1},  {3, 6, 2100, 3},  {1, 700, 130, 1}, {40, 12, 90, 4}};
  int64_t cases = 0;
  for (const auto& [outer, channels, inner, samples] : shapes)
    for (const bool subtract_mean : {true, false})
      for (const int64_t offset : {0, 1}) {
        const ChannelView view{outer, channels, inner};
        const LayerNormOptions options{offset == 0 ? 1 : samples, subtract_mean, subtract_mean, offset == 1};
        run_layer_norm<float>(backend, view, options, offset, random);
        ++cases;
        if (view.numel() > 100000) continue;  // definitions take long
        run_layer_norm<BFloat16>(backend, view, options, offset, random);
        run_layer_norm<double>(backend, view, options, offset, random);
        run_layer_norm<Half>(backend, view, options, offset, random);
        cases += 3;
      }
  return cases;
}

int64_t run_activations(Cpu& backend) {
  for (const ActivationKind kind : kTranscendental) {
    run_every_value<Half>(backend, kind, 10, -14, 0.25);
    run_every_value<BFloat16>(backend, kind, 7, -126, 0.25);
  }
  return 2 * std::size(kTranscendental);
}

// Numbers of channels with and without a specialized transposition, full tiles and partial tiles.
int64_t run_images(Cpu& backend, std::mt19937& random) {
  const ChannelView images[] = {{2, 3, 35}, {1, 4, 64}, {3, 1, 50}, {2, 5, 1000}, {1, 130, 70}, {2, 3, 5000}};
  int64_t cases = 0;
  for (const ChannelView& view : images)
    for (const int64_t offset : {0, 1}) {
      run_standardize(backend, view, offset, random);
      ++cases;
    }
  run_standardize(backend, {1, 3, 400003}, 1, random);  // with non-temporal stores
  return cases + 1;
}

// Outputs that are large enough for non-temporal stores: short rows, long rows and channels last. Rows of two values
// are never stored that way, nor those of one value of a group.
int64_t run_nontemporal(Cpu& backend, std::mt19937& random) {
  int64_t cases = 0;
  for (const ChannelView& view : {ChannelView{11, 250, 49}, {2, 70, 1000}, {550, 640, 1}, {1200, 64, 2}})
    for (const int64_t offset : {0, 1}) {
      run<float>(backend, view, offset, random);
      run<BFloat16>(backend, view, offset, random);
      cases += 2;
    }
  // One position; rows that are not aligned; ranges of groups and of positions.
  for (const GroupView& view : {GroupView{1088, 1, 67, 1, false},
                                {544, 3, 129, 1, false},
                                {8, 4, 260, 40, false},
                                {1088, 1, 67, 1, true},
                                {64, 3, 96, 20, true},
                                {2, 4, 32, 2000, true}})
    for (const int64_t offset : {0, 1}) {
      run_group_norm<float>(backend, view, offset, random);
      run_group_norm<BFloat16>(backend, view, offset, random);
      cases += 2;
    }
  for (const ChannelView& view : {ChannelView{1500, 1024, 1}, {2, 300, 3072}})
    for (const int64_t offset : {0, 1}) {
      run_layer_norm<float>(backend, view, {1, false, true, false}, offset, random);
      ++cases;
    }
  return cases;
}

}  // namespace

int main() {
  run_shares();
  Cpu backend;
  std::mt19937 random(7);
  int64_t cases = run_floating(backend, random);
  cases += run_integers(backend, random);
  if (std::string(cpu::capability()) == "baseline") cases += run_counts(random);  // the same for all instruction sets
  cases += run_groups(backend, random);
  cases += run_layers(backend, random);
  cases += run_activations(backend);
  cases += run_images(backend, random);
  run_finish(backend);
  run_nonfinite(backend);
  cases += run_nontemporal(backend, random);
  std::printf("%s: %lld cases, %lld values checked\n", cpu::capability(), static_cast<long long>(cases),
              static_cast<long long>(checks));
}
