// Runs every CUDA kernel in the simulator over shapes, dtypes, alignments and devices, and compares the results with
// the definition in double. Buffers have their exact size, so that AddressSanitizer detects every access out of bounds.
// Prints how many cases it ran.
//
//   main full | small | tiny    the number of shapes
//   main samples                norms of samples instead
//   main single | clusters      one launch instead, at the limit of shared memory
//   main pipelined              one launch for tensors that exceed the L2 cache
//   main persistent             one launch for tensors that shared memory holds a part of
#include <map>

#include "definition.h"
#include "group_norm.h"
#include "kernels/cuda/batch_norm.cuh"
#include "layer_norm.h"
#include "resources.h"
#include "single_launch.h"

using namespace normfused;
using namespace normfused::testing;

namespace {

std::map<std::string, int64_t> ran;

struct Cuda {
  const char* device;
  cuda::DeviceLimits limits;

  std::string name() const { return std::string("cuda on ") + device; }

  // Runs an operation and checks that it took at most this many launches and left the tickets zero.
  template <class Args>
  void start(const char* what, cudaError_t (*kernel)(const Args&, cuda::Resources&), const Args& args,
             unsigned max_launches) const {
    HostResources resources(limits);
    const unsigned launches = cudahost::launches;
    try {
      if (kernel(args, resources) != cudaSuccess) throw std::runtime_error("the launch failed");
      if (!resources.tickets_are_zero()) throw std::runtime_error("a ticket is not zero after the launch");
      if (cudahost::launches - launches > max_launches) throw std::runtime_error("too many launches");
    } catch (const std::exception& error) {
      std::printf("FAILED %s: %s: %s\n", current.c_str(), what, error.what());
      std::exit(1);
    }
    ++ran[what];
  }

  // A mask whose bits are written one by one takes one more launch, which clears it.
  void batch_norm_training(const BatchNormForward& args) const {
    start("batch_norm_training", cuda::batch_norm_training, args, 2 + (args.mask != nullptr));
  }
  void batch_norm_inference(const BatchNormForward& args) const {
    // With short rows a block contains values of more channels than it has threads, so it cannot prepare coefficients.
    const bool prepares = args.view.inner == 1 || args.view.inner > 32;
    start("batch_norm_inference", cuda::batch_norm_inference, args, (prepares ? 1 : 2) + (args.mask != nullptr));
  }
  void batch_norm_backward(const BatchNormBackward& args) const {
    start("batch_norm_backward", cuda::batch_norm_backward, args, 2);
  }
  void channel_moments(const ChannelStats& args) const { start("channel_moments", cuda::channel_moments, args, 1); }
  void channel_sums(const ChannelStats& args) const { start("channel_sums", cuda::channel_sums, args, 1); }
  void integer_sums(const IntegerSums& args) const { start("integer_sums", cuda::integer_sums, args, 1); }
  void pack_moments(const PackMoments& args) const { start("pack_moments", cuda::pack_moments, args, 1); }
  void merge_ranks(const MergeRanks& args) const { start("merge_ranks", cuda::merge_ranks, args, 2); }
  void local_response_norm(const LocalResponseNorm& args) const {
    start("local_response_norm", cuda::local_response_norm, args, 1);
  }
  void standardize(const Standardize& args) const { start("standardize", cuda::standardize, args, 2); }
  void group_norm(const GroupNormForward& args) const {
    start("group_norm", cuda::group_norm, args, 3 + (args.mask != nullptr));
  }
  void group_norm_backward(const GroupNormBackward& args) const {
    start("group_norm_backward", cuda::group_norm_backward, args, 6);
  }
  void layer_norm(const LayerNormForward& args) const { start("layer_norm", cuda::layer_norm, args, 3); }
  void layer_norm_backward(const LayerNormBackward& args) const {
    start("layer_norm_backward", cuda::layer_norm_backward, args, 5);
  }
};

const Cuda kDevices[] = {
    {"one multiprocessor", {1, int64_t{1} << 40, false, 24 << 10, 8}},
    {"a large device", {100000, 0}},  // the maximum number of splits, every store streaming
};

std::string describe(const ChannelView& view) {
  return "outer " + std::to_string(view.outer) + " channels " + std::to_string(view.channels) + " inner " +
         std::to_string(view.inner);
}

// The maximum number of splits, one per unit, and some without work.
void run_fine_splits(const ChannelView& view, int64_t offset, std::mt19937& random) {
  current = "fine splits " + describe(view) + " offset " + std::to_string(offset);
  Buffer<float> input(view.numel(), offset);
  std::uniform_int_distribution<int> eighths(-16, 16);
  for (int64_t i = 0; i < view.numel(); ++i) input.data[i] = static_cast<float>(3 + eighths(random) / 8.0);
  const cuda::DeviceLimits device{1, 0};
  const bool aligned = cuda::all_aligned(input.data);
  const cuda::ReductionPlan plan =
      cut(cuda::plan_reduction(view, {sizeof(float), 1, aligned}, device), view.numel(), 3, 4);
  HostResources resources(device);

  std::vector<double> sum(view.channels), squares(view.channels), low(view.channels), high(view.channels);
  const cuda::SumsOp<float> op{input.data, view};
  reduce(op, cuda::WriteResults<double>{{sum.data(), squares.data(), low.data(), high.data()}}, cuda::NoApply{}, plan,
         resources);
  std::vector<double> expected(view.channels), expected_squares(view.channels);
  std::vector<float> expected_low(view.channels, 9), expected_high(view.channels, -9);
  for (int64_t i = 0; i < view.numel(); ++i) {
    const int64_t c = i / view.inner % view.channels;
    expected[c] += input.data[i];
    expected_squares[c] += input.data[i] * input.data[i];
    expected_low[c] = std::min(expected_low[c], input.data[i]);
    expected_high[c] = std::max(expected_high[c], input.data[i]);
  }
  for (int64_t c = 0; c < view.channels; ++c) {
    expect_near("sum", c, sum[c], expected[c], 0);  // multiples of 1/8: every sum is exact
    expect_near("sum_of_squares", c, squares[c], expected_squares[c], 0);
    expect_near("min", c, low[c], expected_low[c], 0);
    expect_near("max", c, high[c], expected_high[c], 0);
  }
  std::vector<double> mean(view.channels), m2(view.channels);
  const cuda::MomentsOp<float, false> moments{input.data, view};
  reduce(moments, cuda::WriteResults<double>{{mean.data(), m2.data()}}, cuda::NoApply{}, plan, resources);
  for (int64_t c = 0; c < view.channels; ++c) {
    const auto count = static_cast<double>(view.positions());
    expect_near("mean", c, mean[c], expected[c] / count, 1e-6);
    expect_near("m2", c, m2[c], expected_squares[c] - expected[c] / count * expected[c], 1e-5 * expected_squares[c]);
  }
  if (!resources.tickets_are_zero()) {
    std::printf("FAILED %s: a ticket is not zero after the launch\n", current.c_str());
    std::exit(1);
  }
  ++ran["fine splits"];
}

// Data for which naive sums lose all digits, one kind per channel.
void run_extremes(const Cuda& backend, const ChannelView& view) {
  enum { kConstant, kFarFromZero, kNaN, kInfinite, kHuge, kOutlierFirst, kOrdinary, kChannels };
  current = backend.name() + " extremes " + describe(view);
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  std::vector<float> input(view.numel());
  std::vector<int64_t> seen(kChannels);
  for (int64_t i = 0; i < view.numel(); ++i) {
    const int64_t c = i / view.inner % kChannels, m = seen[c]++;
    const float z = normal(random);
    input[i] = c == kConstant             ? 0.1f
               : c == kFarFromZero        ? 1e4f + z
               : c == kHuge               ? 1e19f * z
               : c == kOutlierFirst       ? (m == 0 ? 1e6f : z)
               : c == kNaN && m == 7      ? std::nanf("")
               : c == kInfinite && m == 7 ? std::numeric_limits<float>::infinity()
                                          : z;
  }
  std::vector<long double> mean(kChannels), m2(kChannels);
  for (int64_t i = 0; i < view.numel(); ++i) mean[i / view.inner % kChannels] += input[i];
  for (auto& value : mean) value /= view.positions();
  for (int64_t i = 0; i < view.numel(); ++i) {
    const long double deviation = input[i] - mean[i / view.inner % kChannels];
    m2[i / view.inner % kChannels] += deviation * deviation;
  }
  std::vector<double> results[4];
  for (auto& r : results) r.resize(kChannels);
  backend.channel_moments({view,
                           DType::kFloat32,
                           input.data(),
                           {results[0].data(), results[1].data(), results[2].data(), results[3].data()}});
  for (int c = 0; c < kChannels; ++c) {
    const double expected = static_cast<double>(mean[c]), squares = static_cast<double>(m2[c]);
    if (c == kConstant) {
      expect_near("mean of a constant", c, results[0][c], static_cast<double>(0.1f), 0);
      expect_near("m2 of a constant", c, results[1][c], 0, 0);
    } else {
      expect_near("mean", c, results[0][c], expected,
                  1e-7 * std::abs(expected) + 1e-6 * std::sqrt(squares / view.positions()));
      expect_near("m2", c, results[1][c], squares, 1e-5 * squares);
    }
    const bool unordered = c == kNaN;
    expect_near("min is NaN", c, std::isnan(results[2][c]), unordered, 0);
    expect_near("max is NaN", c, std::isnan(results[3][c]), unordered, 0);
  }
  ++ran["extremes"];
}

// Counts the blocks that recompute a channel. They must do so if it contains an infinity or overflows, and only then: a
// NaN is a valid result.
struct Counting : cuda::MomentsOp<float, true> {
  int* recomputes;

  template <class... A>
  void recompute(A&&... arguments) const {
    if (threadIdx.x == 0) ++*recomputes;
    cuda::MomentsOp<float, true>::recompute(std::forward<A>(arguments)...);
  }
};

void run_recomputes() {
  const cuda::DeviceLimits device{1, int64_t{1} << 40};
  for (const ChannelView& view : {ChannelView{3, 4, 500}, ChannelView{1500, 4, 1}})
    for (const bool has_infinity : {false, true}) {
      current = "recomputes " + describe(view) + (has_infinity ? " with an infinity" : " with NaN");
      std::vector<float> input(view.numel(), std::nanf(""));
      for (int64_t i = 0; i < view.numel(); ++i)
        if (i / view.inner % view.channels == 1) input[i] = 1;  // a valid channel among them
      if (has_infinity) input[view.inner] = std::numeric_limits<float>::infinity();
      int recomputes = 0;
      std::vector<double> results[4];
      for (auto& r : results) r.resize(view.channels);
      HostResources resources(device);
      const cuda::ReductionPlan plan = cuda::plan_reduction(view, {sizeof(float), 1, false}, device);
      reduce(Counting{{input.data(), view}, &recomputes},
             cuda::WriteResults<double>{{results[0].data(), results[1].data(), results[2].data(), results[3].data()}},
             cuda::NoApply{}, plan, resources);
      expect_near("recomputes", 0, recomputes, has_infinity, 0);
      for (int64_t c = 0; c < view.channels; ++c)
        for (int k = 0; k < 4; ++k)
          expect_near("result", 4 * c + k, results[k][c],
                      c != 1          ? std::nan("")
                      : !has_infinity ? (k == 1 ? 0 : 1)
                      : k == 1        ? std::nan("")
                      : k == 2        ? 1
                                      : HUGE_VAL,
                      0);
    }
  ++ran["recomputes"];
}

// Each offset runs on one of the devices, which change places with every view and order. Many channels are slow in the
// simulator on a large device, which has a block for each few of them.
void run_all(const ChannelView& view, const std::vector<int64_t>& offsets, bool is_full, std::mt19937& random) {
  static int64_t views = 0;
  ++views;
  for (const int64_t offset : offsets) {
    for (const Cuda& device : kDevices) {
      const int64_t place = &device - kDevices;
      const bool is_small = view.channels > 1000 && !is_full;
      if (is_small ? place > 0 : (place + offset + views + cudahost::order) % 2 == 0) continue;
      run<float>(device, view, offset, random);
      run<double>(device, view, offset, random);
      run<Half>(device, view, offset, random);
      run<BFloat16>(device, view, offset, random);
      run_integer_sums<uint8_t>(device, DType::kUInt8, view, offset, Integers::kAny, random);
      run_integer_sums<int8_t>(device, DType::kInt8, view, offset, Integers::kAny, random);
      run_integer_sums<int16_t>(device, DType::kInt16, view, offset, Integers::kAny, random);
      run_integer_sums<int32_t>(device, DType::kInt32, view, offset, Integers::kAny, random);
      run_integer_sums<int64_t>(device, DType::kInt64, view, offset, Integers::kAny, random);
    }
    run_fine_splits(view, offset, random);
  }
}

// Samples, groups, channels, positions: runs that are whole, masked, folded and of single values; columns that are
// plain, repeated and of single values; more channels of a group than lanes of a warp.
void run_groups(std::mt19937& random) {
  const int64_t shapes[][4] = {{1, 1, 1, 2},    {2, 3, 6, 35}, {5, 4, 12, 9}, {3, 2, 140, 49},
                               {1, 2, 6, 4100}, {7, 2, 4, 8},  {2, 5, 5, 64}, {6, 4, 32, 1},
                               {1, 1, 2, 9000}, {3, 2, 6, 4},  {4, 3, 3, 16}, {2, 1, 40, 130}};
  for (const auto& [samples, groups, channels, inner] : shapes)
    for (const bool channels_last : {false, true})
      for (const int64_t offset : {0, 1}) {
        const GroupView view{samples, groups, channels, inner, channels_last};
        for (const Cuda& device : kDevices) {
          run_group_norm<float>(device, view, offset, random);
          run_group_norm<BFloat16>(device, view, offset, random);
          if (&device != kDevices) continue;
          run_group_norm<double>(device, view, offset, random);
          run_group_norm<Half>(device, view, offset, random);
        }
      }
}

// Rows of single values and of vectors, held by a few lanes, by a warp, by a block, and in several chunks; columns that
// are plain, repeated and of single values, in one tile and many; parameters by sample.
void run_layers(std::mt19937& random) {
  const ChannelView views[] = {{5, 7, 1},     {31, 64, 1},  {12, 200, 1}, {9, 768, 1},  {3, 4100, 1}, {4, 3001, 1},
                               {2, 18000, 1}, {1, 1, 1},    {6, 1, 1},    {700, 16, 1}, {4, 12, 49},  {2, 40, 64},
                               {6, 3, 5},     {3, 130, 36}, {2, 2, 3000}, {3, 1, 8}};
  int64_t cases = 0;
  for (const ChannelView& view : views)
    for (const int64_t offset : {0, 1})
      for (const bool subtract_mean : {true, false}) {
        const int64_t samples = view.outer % 3 == 0 ? 3 : 1;
        for (const LayerNormOptions& options : {LayerNormOptions{1, false, subtract_mean, cases % 2 == 0},
                                                {samples, cases % 4 < 2, subtract_mean, true}}) {
          const Cuda& device = kDevices[++cases % 2];
          run_layer_norm<float>(device, view, options, offset, random);
          if (view.numel() > 10000 && cases % 4 > 0) continue;  // slow in the simulator
          run_layer_norm<BFloat16>(device, view, options, offset, random);
          run_layer_norm<double>(device, view, options, offset, random);
          run_layer_norm<Half>(device, view, options, offset, random);
        }
      }
}

// A grid of more than 2^32 blocks must not become a small one.
void check_that_large_grids_are_refused() {
  try {
    (void)cuda::for_each_channel([](int64_t) {}, (int64_t{1} << 32 | 1) * cuda::kThreads, nullptr);
  } catch (const cudahost::Error&) {
    return;
  }
  std::printf("FAILED: a grid of 2^32 + 1 blocks was launched\n");
  std::exit(1);
}

// Prints how many values were checked and how many cases of each kernel ran.
void report() {
  std::printf("order %u: %lld values checked\n", cudahost::order, static_cast<long long>(checks));
  for (const auto& [what, times] : ran)
    std::printf("  %-22s %5lld cases\n", what.c_str(), static_cast<long long>(times));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string size = argc > 1 ? argv[1] : "full";
  std::mt19937 random(7);
  check_that_large_grids_are_refused();
  if (size == "samples") {
    run_groups(random);
    run_layers(random);
    report();
    return 0;
  }
  if (size == "single" || size == "clusters") {
    max_cluster = size == "single" ? 1 : 8;
    run_single_launches(random);
    report();
    return 0;
  }
  if (size == "pipelined") {
    run_pipelined_launches(random);
    report();
    return 0;
  }
  if (size == "persistent") {
    run_persistent_launches(random);
    report();
    return 0;
  }
  // Every path: rows that are whole, masked and of single values; columns that are repeated, in tiles and of single
  // values; one block and many. Extents around a vector, a warp, a block and a tile.
  std::vector<ChannelView> views{{1, 1, 2}, {1, 3, 31}, {3, 5, 49}, {2, 3, 16}, {2, 3, 1}, {31, 3, 1}, {31, 8, 1}};
  if (size != "tiny") {
    const ChannelView more[] = {{1, 1, 1},  {1, 65, 1},   {31, 1, 1},   {4, 65, 49}, {2, 3, 4097}, {3, 9, 7},
                                {3, 65, 1}, {4097, 3, 1}, {2, 2049, 1}, {31, 65, 1}, {40, 72, 1}};
    views.insert(views.end(), std::begin(more), std::end(more));
  }
  if (size == "full") {
    const ChannelView more[] = {{4097, 1, 1},  {31, 65, 49},  {1, 2049, 4},  {1, 1, 70000}, {1, 2, 40000},
                                {4, 3, 12544}, {4097, 65, 1}, {2049, 64, 1}, {31, 2049, 1}};
    views.insert(views.end(), std::begin(more), std::end(more));
  }
  for (const ChannelView& view : views) {
    // Shapes with very many blocks are slow in the simulator.
    const bool costly = view.numel() > 100000 || (view.inner > 1 && view.channels > 1000);
    run_all(view, costly ? std::vector<int64_t>{0} : std::vector<int64_t>{0, 1}, size == "full", random);
  }
  // Images: whole and clipped tiles; more channels than a tile holds, and than a launch. The device does not matter.
  std::vector<ChannelView> images{{2, 3, 35}, {1, 4, 64}, {3, 1, 50}, {2, 5, 848}};
  if (size != "tiny") images.insert(images.end(), {{1, 3, 1400}, {1, 40, 70}, {1, 130, 66}});
  for (const ChannelView& view : images)
    for (const int64_t offset : {0, 1}) run_standardize(kDevices[0], view, offset, random);
  for (const Cuda& device : kDevices) {
    run_finish(device);
    run_nonfinite(device);
  }
  run_recomputes();
  if (size != "tiny")
    for (const Cuda& device : kDevices)
      for (const ChannelView& view : {ChannelView{4, 7, 3001}, ChannelView{12000, 7, 1}, ChannelView{500, 7, 9}})
        run_extremes(device, view);
  report();
}
