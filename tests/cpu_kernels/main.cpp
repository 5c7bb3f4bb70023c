// Runs every CPU kernel without torch over shapes, dtypes and alignments, and compares it with the definition in
// double. Built with sanitizers, its exactly sized buffers also show every read or write out of bounds. Prints what it
// ran.
#include <thread>

#include "definition.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/nontemporal.h"
#include "kernels/cpu/plan.h"

// In place of nontemporal.cpp: whatever cache this machine has, outputs are streamed that take no time to check.
int64_t normfused::cpu::nontemporal_threshold(int64_t) { return 256 << 10; }

using namespace normfused;
using namespace normfused::testing;

namespace {

// Three threads whatever the machine has, so that every split is run split.
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
  void pack_moments(const PackMoments& args) { cpu::pack_moments(args, kThreads); }
  void merge_ranks(const MergeRanks& args) { cpu::merge_ranks(args, kThreads); }
  void standardize(const Standardize& args) { cpu::standardize(args, kThreads); }
  void local_response_norm(const LocalResponseNorm& args) { cpu::local_response_norm(args, kThreads); }
};

// Values that the busiest of some threads has, over its share.
double load_of_the_busiest(const ChannelView& view, const cpu::Plan& plan, int64_t threads) {
  const int64_t chunk = std::max(cpu::grain(plan), (plan.units() + threads - 1) / threads);
  int64_t busiest = 0;
  for (int64_t begin = 0; begin < plan.units(); begin += chunk) {
    int64_t load = 0;
    for (int64_t unit = begin; unit < std::min(begin + chunk, plan.units()); ++unit) {
      const int64_t c0 = unit % plan.channel_units * plan.channel_block;
      const int64_t m0 = unit / plan.channel_units * plan.position_block;
      load += std::min(plan.channel_block, view.channels - c0) * std::min(plan.position_block, view.positions() - m0);
    }
    busiest = std::max(busiest, load);
  }
  return static_cast<double>(busiest * threads) / static_cast<double>(view.numel());
}

// Two or four threads share each batch norm of ResNet-50 evenly.
void run_shares() {
  const int64_t shapes[][2] = {{64, 112}, {64, 56},   {256, 56}, {128, 28}, {512, 28},
                               {256, 14}, {1024, 14}, {512, 7},  {2048, 7}};
  for (const auto& [channels, side] : shapes)
    for (const ChannelView& view : {ChannelView{32, channels, side * side}, ChannelView{32 * side * side, channels, 1}})
      for (const int64_t itemsize : {2, 4})
        for (const int64_t operands : {1, 2})
          for (const int64_t threads : {2, 4})
            expect_near("share", channels,
                        load_of_the_busiest(view, cpu::plan_reduction(view, itemsize, operands), threads), 1, 0.1);
}

}  // namespace

int main() {
  run_shares();
  Cpu backend;
  std::mt19937 random(7);
  int64_t cases = 0;
  // Channels first: rows shorter and longer than vectors and tiles; few and many channels. Channels last: channel
  // counts around vector, register tile and unit. Rows of a few values, which are walked as channels last are: too few
  // of them for that, more than a tile of them, more channels than its lanes hold, and units that end inside a row.
  const ChannelView views[] = {
      {1, 1, 1},    {1, 1, 2},     {2, 3, 1},    {1, 3, 31},  {4, 3, 49},   {32, 65, 49}, {2, 130, 7},   {3, 2, 4097},
      {2, 3, 9000}, {5, 2049, 2},  {3, 40, 900}, {7, 16, 64}, {31, 1, 1},   {33, 65, 1},  {700, 96, 1},  {900, 70, 1},
      {3, 2049, 1}, {60, 1100, 1}, {4000, 3, 1}, {7, 40, 4},  {600, 40, 2}, {9, 65, 16},  {5, 2100, 25}, {13001, 3, 3},
  };
  for (const ChannelView& view : views) {
    for (const int64_t offset : {0, 1}) {
      run<float>(backend, view, offset, random);
      run<BFloat16>(backend, view, offset, random);
    }
    run<double>(backend, view, 1, random);
    run<Half>(backend, view, 1, random);
    cases += 6;
  }
  // Integers; of bytes also so many that 32 bits do not hold their squares.
  for (const ChannelView& view : views)
    for (const int64_t offset : {0, 1}) {
      run_integer_sums<uint8_t>(backend, DType::kUInt8, view, offset, false, random);
      run_integer_sums<int8_t>(backend, DType::kInt8, view, offset, false, random);
      run_integer_sums<int16_t>(backend, DType::kInt16, view, offset, false, random);
      run_integer_sums<int32_t>(backend, DType::kInt32, view, offset, false, random);
      run_integer_sums<int64_t>(backend, DType::kInt64, view, offset, false, random);
      cases += 5;
    }
  run_integer_sums<uint8_t>(backend, DType::kUInt8, {1, 2, 140000}, 0, true, random);
  ++cases;
  // Images: of the numbers of channels that have shuffles of their own and of others, in tiles and parts of tiles.
  const ChannelView images[] = {{2, 3, 35}, {1, 4, 64}, {3, 1, 50}, {2, 5, 1000}, {1, 130, 70}, {2, 3, 5000}};
  for (const ChannelView& view : images)
    for (const int64_t offset : {0, 1}) {
      run_standardize(backend, view, offset, random);
      ++cases;
    }
  run_finish(backend);
  run_nonfinite(backend);
  // So large that outputs are streamed.
  run_standardize(backend, {1, 3, 400003}, 1, random);
  ++cases;
  // Outputs large enough to be streamed past the caches, from short rows, long rows and channels last. Rows of two
  // values are not.
  for (const ChannelView& view : {ChannelView{11, 250, 49}, {2, 70, 1000}, {550, 640, 1}, {1200, 64, 2}})
    for (const int64_t offset : {0, 1}) {
      run<float>(backend, view, offset, random);
      run<BFloat16>(backend, view, offset, random);
      cases += 2;
    }
  std::printf("%s: %lld cases, %lld values checked\n", cpu::capability(), static_cast<long long>(cases),
              static_cast<long long>(checks));
}
