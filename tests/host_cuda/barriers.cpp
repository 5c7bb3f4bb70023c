// Small launches that execute every barrier and fence of the kernels, for builds with ThreadSanitizer. If any barrier
// or fence is removed from the kernels, a race is reported or a result is wrong. It instantiates few kernels, because
// the test builds it once per barrier.
#include "definition.h"
#include "kernels/cuda/group_norm_backward_single.cuh"
#include "kernels/cuda/layer_norm_columns.cuh"
#include "kernels/cuda/layer_norm_rows.cuh"
#include "kernels/cuda/local_response_norm.cuh"
#include "kernels/cuda/standardize.cuh"
#include "layer_norm.h"
#include "resources.h"

using namespace normfused;
using namespace normfused::testing;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr cuda::DeviceLimits kDevice{1, 0, true, 96 << 10};
constexpr cuda::DeviceLimits kClusters{1, 0, true, 44 << 10, 8};

struct Data {
  ChannelView view;
  std::vector<float> x;
  std::vector<double> mean, m2;

  // `extreme`: channel 0 contains an infinity, and the squares of channel 1 overflow float.
  Data(ChannelView v, bool extreme) : view(v), x(v.numel()), mean(v.channels), m2(v.channels) {
    for (int64_t i = 0; i < v.numel(); ++i) {
      const int64_t c = channel(i);
      x[i] = static_cast<float>((i * 37 % 64) / 8.0 + static_cast<double>(c));
      if (extreme && c == 1) x[i] *= 1e30f;
    }
    if (extreme) x[0] = static_cast<float>(kInfinity);
    for (int64_t i = 0; i < v.numel(); ++i) mean[channel(i)] += x[i] / static_cast<double>(v.positions());
    for (int64_t i = 0; i < v.numel(); ++i) m2[channel(i)] += (x[i] - mean[channel(i)]) * (x[i] - mean[channel(i)]);
  }
  int64_t channel(int64_t i) const { return i / view.inner % view.channels; }
};

// Moments from three splits, the last without work: merged at once (group 3), or as groups of two and one (group 2).
void statistics(const ChannelView& view, bool extreme, int group) {
  current = "statistics of " + std::to_string(view.outer) + " x " + std::to_string(view.channels) + " x " +
            std::to_string(view.inner);
  const Data data(view, extreme);
  cuda::ReductionPlan plan = cuda::plan_reduction(view, {sizeof(float), 1, true}, kDevice);
  if (plan.by_rows && view.channels > 1) plan = with_lanes(plan, cuda::kWarp);
  plan = cut(plan, 2, 1, group);
  HostResources resources(kDevice);
  std::vector<double> mean(view.channels), m2(view.channels);
  const cuda::MomentsOp<float, false> op{data.x.data(), view};
  reduce(op, cuda::WriteResults<double>{{mean.data(), m2.data()}}, cuda::NoApply{}, plan, resources);
  cudahost::synchronize();
  for (int64_t c = 0; c < view.channels; ++c) {
    expect_near("mean", c, mean[c], data.mean[c], 1e-6 * std::abs(data.mean[c]));
    expect_near("m2", c, m2[c], data.m2[c], 1e-5 * data.m2[c]);
  }
}

// Training in one launch, or in place in two launches that overlap, with a cumulative average. In a single launch, a
// block can read a vector that two rows share while another block writes its part of it.
void training(const ChannelView& view, const cuda::ReductionPlan& plan, const cuda::DeviceLimits& device = kDevice) {
  current = "training of " + std::to_string(view.outer) + " x " + std::to_string(view.channels) + " x " +
            std::to_string(view.inner);
  const Data data(view, false);
  HostResources resources(device);
  std::vector<float> output = data.x, table(3 * view.channels), running_mean(view.channels, 8);
  const float* const input = plan.single() ? data.x.data() : output.data();
  std::vector<double> mean(view.channels), invstd(view.channels);
  int64_t batches = 3;
  BatchNormForward args{};
  args.view = view;
  args.mean = mean.data();
  args.invstd = invstd.data();
  args.eps = 1e-5;
  args.running_mean = {running_mean.data(), DType::kFloat32};
  args.num_batches_tracked = &batches;
  args.momentum = plan.one_launch() ? 0.25 : std::nan("");
  const cuda::MomentsOp<float, false> op{input, view};
  const cuda::NormalizeOp<float> normalize{input, output.data(), table.data(), &batches, nullptr, {}, nullptr};
  const cuda::FinishTraining<float> finish{args, table.data()};
  if (plan.one_launch()) {
    reduce(op, finish, normalize, plan, resources);
  } else {
    reduce(op, finish, cuda::NoApply{}, plan, resources);
    apply(normalize, cuda::plan_apply(view, sizeof(float), sizeof(float), true, kDevice), nullptr, true);
  }
  cudahost::synchronize();
  if (!resources.tickets_are_zero()) throw std::runtime_error("a ticket is not zero after the launch");
  expect_near("num_batches_tracked", 0, static_cast<double>(batches), 4, 0);
  for (int64_t c = 0; c < view.channels; ++c)
    expect_near("running_mean", c, running_mean[c], 8 + (data.mean[c] - 8) / 4, 1e-5);
  for (int64_t i = 0; i < view.numel(); ++i) {
    const int64_t c = data.channel(i);
    const double expected_invstd = 1 / std::sqrt(data.m2[c] / static_cast<double>(view.positions()) + 1e-5);
    expect_near("output", i, output[i], (data.x[i] - data.mean[c]) * expected_invstd, 1e-5);
  }
}

void training_in_one_launch(const ChannelView& view, const cuda::DeviceLimits& device = kDevice) {
  const cuda::ReductionPlan plan = cuda::plan_reduction(view, {sizeof(float), 1, true, true}, device);
  if (!plan.single()) std::abort();
  training(view, plan, device);
}

void training_in_two_launches(const ChannelView& view) {
  training(view, cuda::plan_reduction(view, {sizeof(float), 1, true}, kDevice));
}

// Three blocks. Tiles of `lanes` lanes per channel, `splits` splits of each, and groups of two splits.
void training_pipelined(const ChannelView& view, int lanes, int splits, int64_t window) {
  const cuda::ReductionPlan plan = with_lanes(cuda::plan_reduction(view, {sizeof(float), 1, true}, kDevice), lanes);
  const cuda::ReductionPlan chosen = pipelined(cut(plan, splits, 0, 2), window, 3);
  if (chosen.splits() != splits || window > chosen.tiles()) std::abort();
  training(view, chosen);
}

// Three blocks, groups of two splits. A split is one row of threads.
void training_persistent(const ChannelView& view, int splits) {
  const cuda::ReductionPlan plan = cuda::plan_reduction(view, {sizeof(float), 1, true}, kDevice);
  const cuda::ReductionPlan chosen = persistent(cut(plan, splits, 0, 2), 3);
  if (chosen.splits() != splits) std::abort();
  training(view, chosen);
}

// Sums of gradients. Their initial states are loaded by the block together.
void gradients(const ChannelView& view) {
  current = "gradients of " + std::to_string(view.outer) + " x " + std::to_string(view.channels) + " x " +
            std::to_string(view.inner);
  const Data data(view, false);
  const std::vector<float> ones(view.numel(), 1.f);
  std::vector<double> invstd(view.channels, 0.5);
  std::vector<float> grad_weight(view.channels), grad_bias(view.channels), table(4 * view.channels);
  BatchNormBackward args{};
  args.view = view;
  args.grad_output = ones.data();
  args.input = data.x.data();
  args.grad_weight = {grad_weight.data(), DType::kFloat32};
  args.grad_bias = {grad_bias.data(), DType::kFloat32};
  args.mean = data.mean.data();
  args.invstd = invstd.data();
  args.training = true;
  const cuda::ReductionPlan plan = cut(cuda::plan_reduction(view, {sizeof(float), 2, true}, kDevice), 2, 1, 2);
  HostResources resources(kDevice);
  reduce(cuda::GradSumsOp<float, false>{args}, cuda::FinishBackward<float, false>{args, table.data()}, cuda::NoApply{},
         plan, resources);
  cudahost::synchronize();
  for (int64_t c = 0; c < view.channels; ++c) {
    expect_near("grad_weight", c, grad_weight[c], 0, 1e-3);
    expect_near("grad_bias", c, grad_bias[c], static_cast<double>(view.positions()), 0);
  }
}

// Backward of group norm in one launch: the channels of a group share coefficients.
void together(const GroupView& view, const cuda::DeviceLimits& device = kDevice) {
  current = "groups of " + std::to_string(view.width()) + " channels of " + std::to_string(view.inner);
  const Data data(view.by_sample(), false);
  const int64_t count = view.samples * view.channels;
  std::vector<float> grad(view.numel()), grad_input(view.numel()), weight(view.channels), table(4 * count);
  std::vector<double> mean(view.statistics()), invstd(view.statistics(), 0.5), grad_weight(count), grad_bias(count);
  std::vector<double> sum(view.statistics()), product(view.statistics());
  const auto channel = [&](int64_t i) { return (view.channels_last ? i : i / view.inner) % view.channels; };
  const auto statistic = [&](int64_t i) {
    return i / (view.channels * view.inner) * view.groups + channel(i) / view.width();
  };
  for (int64_t c = 0; c < view.channels; ++c) weight[c] = static_cast<float>(1 + c % 3);
  for (int64_t i = 0; i < view.numel(); ++i) mean[statistic(i)] += data.x[i] / static_cast<double>(view.count());
  const auto deviation = [&](int64_t i) { return (data.x[i] - mean[statistic(i)]) * 0.5; };
  for (int64_t i = 0; i < view.numel(); ++i) {
    grad[i] = static_cast<float>((i * 29 % 16) / 8.0);
    sum[statistic(i)] += grad[i] * weight[channel(i)];
    product[statistic(i)] += grad[i] * weight[channel(i)] * deviation(i);
  }
  GroupNormBackward args{};
  args.view = view;
  args.grad_output = grad.data();
  args.input = data.x.data();
  args.grad_input = grad_input.data();
  args.weight = {{weight.data(), DType::kFloat32}, false};
  args.mean = mean.data();
  args.invstd = invstd.data();
  const BatchNormBackward by_channel = cuda::by_channel_of(args, grad_weight.data(), grad_bias.data());
  cuda::Reduced reduced{sizeof(float), 2, true, true};
  reduced.together = view.width();
  const cuda::ReductionPlan plan = cuda::plan_reduction(by_channel.view, reduced, device);
  if (!plan.single()) std::abort();
  const cuda::GroupNormalization normalization{args};
  HostResources resources(device);
  reduce(cuda::GroupGradSumsOp<float, false>{{by_channel}, normalization},
         cuda::FinishGroupsTogether<float, false>{
             {by_channel, table.data()}, {args, grad_weight.data(), grad_bias.data(), table.data()}, normalization},
         cuda::GradInputOp<float, false>{
             grad.data(), data.x.data(), grad_input.data(), table.data(), nullptr, nullptr, {}, nullptr, true, false},
         plan, resources);
  cudahost::synchronize();
  for (int64_t i = 0; i < view.numel(); ++i) {
    const double share = (sum[statistic(i)] + deviation(i) * product[statistic(i)]) / static_cast<double>(view.count());
    expect_near("grad_input", i, grad_input[i], 0.5 * (grad[i] * weight[channel(i)] - share), 1e-4);
  }
}

// Inference with coefficients that each block prepares.
void inference(const ChannelView& view) {
  current = "inference of " + std::to_string(view.outer) + " x " + std::to_string(view.channels) + " x " +
            std::to_string(view.inner);
  const Data data(view, false);
  std::vector<float> output(view.numel()), running_mean(view.channels), running_var(view.channels, 4);
  for (int64_t c = 0; c < view.channels; ++c) running_mean[c] = static_cast<float>(c);
  std::vector<double> mean(view.channels), invstd(view.channels);
  BatchNormForward args{};
  args.view = view;
  args.running_mean = {running_mean.data(), DType::kFloat32};
  args.running_var = {running_var.data(), DType::kFloat32};
  args.mean = mean.data();
  args.invstd = invstd.data();
  const cuda::NormalizeOp<float> normalize{data.x.data(), output.data(), nullptr, nullptr, nullptr, {}, nullptr};
  const cuda::ApplyPlan plan = cuda::plan_apply(view, sizeof(float), sizeof(float), true, kDevice);
  if (!plan.may_prepare()) std::abort();
  apply(cuda::InferenceOp<float, false>{normalize, args}, plan, nullptr, false);
  cudahost::synchronize();
  for (int64_t i = 0; i < view.numel(); ++i)
    expect_near("output", i, output[i], (data.x[i] - running_mean[data.channel(i)]) / 2, 0);
  for (int64_t c = 0; c < view.channels; ++c) {
    expect_near("mean", c, mean[c], running_mean[c], 0);
    expect_near("invstd", c, invstd[c], 0.5, 0);
  }
}

// Local response normalization with windows of three channels, forward and backward.
void windows(const ChannelView& view) {
  current = "windows of " + std::to_string(view.outer) + " x " + std::to_string(view.channels) + " x " +
            std::to_string(view.inner);
  const Data data(view, false);
  const std::vector<float> ones(view.numel(), 1.f);
  std::vector<float> output(view.numel());
  const auto start = [&](auto kernel, const float* grad_output) {
    const LocalResponseNorm args{view, DType::kFloat32, data.x.data(), grad_output, output.data(), 3, 3, 1, 1};
    const cuda::WindowPlan plan = cuda::plan_windows(args);
    launch({dim3(static_cast<unsigned>(plan.tiles * plan.chunks)), dim3(cuda::kThreads), nullptr}, kernel, args, plan,
           response_of<float>(args));
    cudahost::synchronize();
  };
  // The sum of f over the window of value i: its channel and one neighbour on each side.
  const auto window_sum = [&](int64_t i, const auto& f) {
    double sum = f(i);
    if (data.channel(i) > 0) sum += f(i - view.inner);
    if (data.channel(i) + 1 < view.channels) sum += f(i + view.inner);
    return sum;
  };
  const auto base = [&](int64_t i) {
    return 1 + window_sum(i, [&](int64_t j) { return double{data.x[j]} * data.x[j]; });
  };
  start(view.inner > 1 ? cuda::response_forward<float, false> : cuda::response_forward<float, true>, nullptr);
  for (int64_t i = 0; i < view.numel(); ++i) expect_near("output", i, output[i], data.x[i] / base(i), 1e-6);
  start(view.inner > 1 ? cuda::response_backward<float, false> : cuda::response_backward<float, true>, ones.data());
  for (int64_t i = 0; i < view.numel(); ++i) {
    const double shares = window_sum(i, [&](int64_t j) { return data.x[j] / (base(j) * base(j)); });
    expect_near("gradient", i, output[i], 1 / base(i) - 2 * data.x[i] * shares, 1e-6);
  }
}

// Images that are transposed, in either direction.
void images(bool input_is_last) {
  current = input_is_last ? "images from channels last" : "images to channels last";
  const ChannelView view{1, 3, 1500};
  const Data data(view, false);
  std::vector<float> output(view.numel());
  const std::vector<double> mean(view.channels, 0.5), std(view.channels, 0.25);
  const Standardize args{view.outer,    view.channels, view.inner,     DType::kFloat32, DType::kFloat32, data.x.data(),
                         output.data(), input_is_last, !input_is_last, mean.data(),     std.data(),      1};
  const cuda::Tiles tiles = cuda::tiles_of(args, 0, view.channels);
  cuda::Constants<float> constants;
  for (int64_t c = 0; c < view.channels; ++c) prepare(normalization_of(args, c), constants.channel[c]);
  launch({dim3(static_cast<unsigned>(tiles.blocks(view.outer))), dim3(cuda::kThreads), nullptr},
         cuda::standardize_tiles<float, float, 1>, data.x.data(), output.data(), tiles, constants);
  cudahost::synchronize();
  for (int64_t row = 0; row < view.outer * view.channels; ++row)
    for (int64_t p = 0; p < view.inner; ++p) {
      const int64_t last = (row / view.channels * view.inner + p) * view.channels + row % view.channels;
      const int64_t first = row * view.inner + p;
      expect_near("output", first, output[input_is_last ? first : last],
                  4 * (data.x[input_is_last ? last : first] - 0.5), 1e-6);
    }
}

// Layer norm of float, without its launchers, which instantiate all dtypes.
struct Layers {
  std::string name() const { return "layers"; }

  void layer_norm(const LayerNormForward& args) const {
    if (args.view.inner > 1) {
      const cuda::LayerColumnsPlan plan = cuda::plan_layer_columns(args.view, 1, sizeof(float), true, kDevice);
      launch({dim3(static_cast<unsigned>(args.view.outer * plan.tiles)), dim3(cuda::kThreads), nullptr},
             cuda::layer_norm_columns<float, 4>, args, plan);
      return cudahost::synchronize();
    }
    const cuda::ResidentRowsPlan plan =
        cuda::plan_resident_rows(cuda::rows_of(args.view, 1, sizeof(float), true), false, kDevice);
    if (plan.lanes <= cuda::kWarp || plan.chunks > 1) std::abort();
    launch({dim3(static_cast<unsigned>(plan.blocks)), dim3(static_cast<unsigned>(plan.threads)), nullptr},
           cuda::normalize_rows<cuda::LayerRowsOp<float>, 4, cuda::resident_vectors(4, 4, false, false)>,
           cuda::LayerRowsOp<float>{args}, plan, cuda::RowPhase::kBoth, static_cast<Moments*>(nullptr));
    cudahost::synchronize();
  }

  void layer_norm_backward(const LayerNormBackward& args) const {
    const int64_t channels = args.view.channels;
    std::vector<float> sums;
    const auto start = [&](auto kernel, const auto& plan, int threads, const auto&... operands) {
      sums.resize(static_cast<size_t>(plan.blocks * 2 * channels));
      launch({dim3(static_cast<unsigned>(plan.blocks)), dim3(static_cast<unsigned>(threads)), nullptr}, kernel, args,
             plan, operands..., sums.data());
      cudahost::synchronize();
    };
    if (args.view.inner > 1) {
      start(cuda::layer_norm_backward_columns<float, 4>,
            cuda::plan_layer_columns(args.view, 1, sizeof(float), true, kDevice), cuda::kThreads);
    } else {
      const cuda::ResidentRowsPlan plan =
          cuda::plan_resident_rows(cuda::rows_of(args.view, 1, sizeof(float), true), true, kDevice);
      start(cuda::layer_norm_backward_rows<float, 4, cuda::resident_vectors(4, 4, true, false)>, plan, plan.threads,
            cuda::RowPhase::kBoth, static_cast<double*>(nullptr));
    }
    for (size_t i = 0; i < sums.size(); ++i) {
      const size_t k = i / static_cast<size_t>(channels) % 2, c = i % static_cast<size_t>(channels);
      static_cast<float*>((k == 0 ? args.grad_bias : args.grad_weight).data)[c] += sums[i];
    }
  }
};

void layers(const ChannelView& view) {
  std::mt19937 random(3);
  Layers backend;
  run_layer_norm<float>(backend, view, {1, false, true, false}, 0, random);
}

// Layer norm of rows that a cluster of blocks stages.
struct StagedLayers {
  cuda::DeviceLimits device;

  std::string name() const { return "staged layers"; }

  void layer_norm(const LayerNormForward& args) const {
    const cuda::ResidentRowsPlan plan =
        cuda::plan_resident_rows(cuda::rows_of(args.view, 1, sizeof(float), true, true), false, device);
    if (!plan.is_staged || plan.chunks != device.max_cluster) std::abort();
    std::vector<Moments> parts(static_cast<size_t>(plan.rows * plan.chunks));
    launch({dim3(static_cast<unsigned>(plan.rows * plan.chunks)), dim3(cuda::kThreads), nullptr, false,
            plan.staged.bytes, plan.chunks},
           cuda::normalize_staged_rows<cuda::LayerRowsOp<float>, 4>, cuda::LayerRowsOp<float>{args}, plan,
           parts.data());
    cudahost::synchronize();
  }
  void layer_norm_backward(const LayerNormBackward&) const {}
};

void staged_layers(int64_t rows, int64_t columns, const cuda::DeviceLimits& device) {
  current = "staged layers of " + std::to_string(columns);
  std::mt19937 random(4);
  const ChannelView view{rows, columns, 1};
  const StagedLayers backend{device};
  LayerNormCase<float, const StagedLayers>(backend, view, {1, false, true, false}, 0, random).run_only_forward();
}

}  // namespace

int main() {
  try {
    for (const int group : {3, 2}) {
      statistics({3, 2, 49}, true, group);    // rows, a warp per channel
      statistics({1, 1, 3072}, true, group);  // rows, two warps per channel
      statistics({3, 1, 1001}, false, group);
      statistics({90, 8, 1}, true, group);  // columns
      statistics({90, 3, 1}, true, group);  // columns, repeated
      statistics({9, 4, 7}, true, group);   // columns, folded
    }
    gradients({90, 8, 1});
    training_in_one_launch({3, 3, 49});
    training_in_one_launch({9, 8, 7});
    training_in_one_launch({1, 1, 200});  // a whole block per channel
    training_in_one_launch({90, 8, 1});
    training_in_one_launch({90, 3, 1});
    training_in_one_launch({1, 1, 17000});  // several vectors in each group of copies
    training_in_one_launch({2200, 8, 1});
    training_in_one_launch({1, 1, 17000}, kClusters);
    training_in_one_launch({2200, 8, 1}, kClusters);
    training_in_two_launches({3, 1, 200});
    training_in_two_launches({40, 8, 1});
    training_pipelined({2, 7, 64}, cuda::kWarp, 1, 1);  // two channels per tile
    training_pipelined({6, 7, 64}, cuda::kWarp, 3, 2);
    training_pipelined({4, 5, 128}, cuda::kThreads, 2, 5);
    training_persistent({90, 8, 1}, 3);  // every block holds what it applies
    training_persistent({280, 8, 1}, 9);
    training_persistent({90, 70, 1}, 6);  // several tiles
    together({1, 2, 6, 40, false});
    together({1, 1, 40, 8, false});
    together({2, 2, 8, 40, true});
    together({1, 2, 12, 800, true}, {1, 0, true, 50 << 10, 2});
    inference({2, 9, 160});
    inference({90, 8, 1});
    layers({3, 1200, 1});  // a block per row
    layers({3, 40, 8});    // columns, two tiles per block
    staged_layers(2, 5000, {1, 0, true, 24 << 10, 1});
    staged_layers(1, 5000, {1, 0, true, 15 << 10, 2});
    windows({2, 9, 5});
    windows({7, 130, 1});
    images(true);
    images(false);
  } catch (const std::exception& error) {
    std::printf("FAILED %s: %s\n", current.c_str(), error.what());
    return 1;
  }
}
