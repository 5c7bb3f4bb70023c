// The CPU kernels of one instruction set with any operation, shape, layout, dtypes, options, values and division into
// parallel ranges. Buffers have the exact size, so sanitizers detect every access out of bounds, and every result is
// compared with its definition.
#include <memory>

#include "bytes.h"
#include "definition.h"
#include "kernels/cpu/nontemporal.h"
#include "norms.h"
#include "value_counts.h"

#ifndef NORMFUSED_FUZZ_CAPABILITY
#define NORMFUSED_FUZZ_CAPABILITY baseline
#endif

namespace {

// How the next call runs.
struct Schedule {
  int64_t parts;              // ranges that the tasks are divided into, one after the other
  bool descending;            // the last range first
  int64_t nontemporal_bytes;  // size of an output from which stores are non-temporal
};
Schedule schedule;

}  // namespace

// Replaces nontemporal.cpp.
int64_t normfused::cpu::nontemporal_threshold(int64_t) { return schedule.nontemporal_bytes; }

using namespace normfused;
using namespace normfused::testing;
using fuzz::Bytes;

namespace {

const cpu::Parallel kRanges{[](int64_t tasks, int64_t grain, cpu::Parallel::Body body, const void* context) {
  const int64_t chunk = std::max(grain, (tasks + schedule.parts - 1) / schedule.parts);
  const int64_t ranges = chunk == 0 ? 0 : (tasks + chunk - 1) / chunk;
  for (int64_t k = 0; k < ranges; ++k) {
    const int64_t begin = (schedule.descending ? ranges - 1 - k : k) * chunk;
    body(context, begin, std::min(begin + chunk, tasks));
  }
}};

const cpu::KernelTable& kTable = cpu::NORMFUSED_FUZZ_CAPABILITY::kernels();

struct Backend {
  std::string name() const { return "fuzzed"; }
#define NF_DTYPE_KERNEL(name, Args) \
  void name(const Args& args) const { kTable.of(args.dtype).name(args, kRanges); }
#define NF_UNTYPED_KERNEL(name, Args) \
  void name(const Args& args) const { kTable.name(args, kRanges); }
#define NF_PORTABLE_KERNEL(name, Args) \
  void name(const Args& args) const { cpu::portable::name(args, kRanges); }
#include "kernels/list.h"
};

ChannelView any_view(Bytes& bytes) {
  const int64_t most = int64_t{1} << bytes.between(3, 16);
  const int64_t outer = bytes.extent(most), channels = bytes.extent(most / outer);
  return {outer, channels, bytes.flag() ? 1 : bytes.extent(most / outer / channels)};
}

// Calls f with a null pointer to one of the types.
template <class... Types, class F>
void with_type(Bytes& bytes, const F& f) {
  const auto choice = static_cast<size_t>(bytes.between(0, sizeof...(Types) - 1));
  size_t k = 0;
  ((k++ == choice ? f(static_cast<Types*>(nullptr)) : void()), ...);
}

template <class T>
constexpr DType integer_dtype() {
  if (std::is_same_v<T, uint8_t>) return DType::kUInt8;
  return sizeof(T) == 1   ? DType::kInt8
         : sizeof(T) == 2 ? DType::kInt16
         : sizeof(T) == 4 ? DType::kInt32
                          : DType::kInt64;
}

void run_norms(Bytes& bytes) {
  const fuzz::Shape shape = fuzz::any_shape(bytes);
  with_type<float, double, Half, BFloat16>(bytes, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    fuzz::NormCase<T>(bytes, kTable.of(Format<T>::dtype), kRanges, shape).run(bytes);
  });
}

// Statistics of tensors with any values.
template <class T>
void run_moments(Bytes& bytes) {
  const ChannelView view = any_view(bytes);
  const int64_t channels = view.channels, offset = bytes.between(0, 3);
  const auto count = static_cast<long double>(view.positions());
  std::mt19937 random(static_cast<uint32_t>(bytes.number(2)));
  Buffer<T> input(view.numel(), offset);
  fuzz::fill(input.data, view.numel(), bytes.pick({0, 24, -64}), bytes.pick({16, 1, 0}),
             static_cast<int>(bytes.between(-6, 6)), random);
  std::vector<int64_t> planted;
  fuzz::plant(bytes, input.data, view.numel(), planted);
  std::vector<long double> mean(channels), m2(channels), largest(channels);
  std::vector<double> low(channels, HUGE_VAL), high(channels, -HUGE_VAL);
  const auto for_each = [&](const auto& f) {
    for (int64_t i = 0; i < view.numel(); ++i) f(i / view.inner % channels, decode(input.data + i));
  };
  for_each([&](int64_t c, double x) {
    mean[c] += x / count;
    largest[c] = std::max<long double>(largest[c], std::abs(x));
    low[c] = std::isnan(x) ? x : std::min(low[c], x);  // once NaN, always NaN: std::min keeps it
    high[c] = std::isnan(x) ? x : std::max(high[c], x);
  });
  for_each([&](int64_t c, double x) { m2[c] += (x - mean[c]) * (x - mean[c]); });
  std::unique_ptr<double[]> results[4];
  for (auto& r : results) r.reset(new double[static_cast<size_t>(channels)]);
  current = std::string("moments ") + Format<T>::name;
  Backend().channel_moments(
      {view, Format<T>::dtype, input.data, {results[0].get(), results[1].get(), results[2].get(), results[3].get()}});
  for (int64_t c = 0; c < channels; ++c) {
    const long double lost = Format<T>::rounding * largest[c];
    expect_near("mean", c, results[0][c], static_cast<double>(mean[c]),
                static_cast<double>(2 * lost + 1e-6 * std::sqrt(m2[c] / count)));
    expect_near("m2", c, results[1][c], static_cast<double>(m2[c]),
                static_cast<double>(1e-5 * m2[c] + 16 * count * lost * lost));
    expect_near("min", c, results[2][c], low[c], 0);
    expect_near("max", c, results[3][c], high[c], 0);
  }
}

void run_statistics_of_any_values(Bytes& bytes) {
  with_type<float, double, Half, BFloat16>(
      bytes, [&](auto* type) { run_moments<std::remove_pointer_t<decltype(type)>>(bytes); });
}

// Sums, moments, synchronization over ranks and local response normalization of moderate values.
void run_others(Bytes& bytes) {
  const ChannelView view = any_view(bytes);
  const int64_t offset = bytes.between(0, 3), which = bytes.between(0, 2);
  const Window window{bytes.flag() ? bytes.between(1, 12) : 2 * view.channels + bytes.between(-2, 3),
                      bytes.pick({0.75, 0.6, 0.5, 1.0, 2.3})};
  if (which == 0 && window.size * view.numel() > 1 << 20) return;  // the definition takes long
  std::mt19937 random(static_cast<uint32_t>(bytes.number(2)));
  with_type<float, double, Half, BFloat16>(bytes, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend backend;
    const Case<T> data(view, offset, random);
    current = Format<T>::name;
    if (which == 0) return run_local_response_norm(backend, window, data, offset);
    if (which == 1) return run_statistics(backend, data, Statistics<T>(data));
    run_ranks(backend, data, offset, random);
  });
}

void run_integers(Bytes& bytes) {
  const ChannelView view = any_view(bytes);
  const int64_t offset = bytes.between(0, 3);
  const bool sums = bytes.flag();
  std::mt19937 random(static_cast<uint32_t>(bytes.number(2)));
  with_type<uint8_t, int8_t, int16_t, int32_t, int64_t>(bytes, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend backend;
    if (sums) return run_integer_sums<T>(backend, integer_dtype<T>(), view, offset, Integers::kAny, random);
    run_value_counts<T>(kRanges, integer_dtype<T>(), view, offset, random);
  });
}

void run_counts(Bytes& bytes) {
  const ChannelView view = any_view(bytes);
  const int64_t offset = bytes.between(0, 3);
  const bool is_double = bytes.flag();
  std::mt19937 random(static_cast<uint32_t>(bytes.number(2)));
  if (is_double) return run_value_counts<double>(kRanges, DType::kFloat64, view, offset, random);
  run_value_counts<float>(kRanges, DType::kFloat32, view, offset, random);
}

template <class T, class Output>
void run_images_of(Bytes& bytes, DType dtype) {
  const ChannelView view = any_view(bytes);
  const int64_t offset = bytes.between(0, 3);
  const bool from_last = bytes.flag(), to_last = bytes.flag();
  std::mt19937 random(static_cast<uint32_t>(bytes.number(2)));
  Backend backend;
  run_standardize<T, Output>(backend, dtype, view, offset, from_last, to_last, random);
}

void run_images(Bytes& bytes) {
  with_type<float, Half, BFloat16>(bytes, [&](auto* type) {
    using Output = std::remove_pointer_t<decltype(type)>;
    switch (bytes.between(0, 2)) {
      case 0:
        return run_images_of<uint8_t, Output>(bytes, DType::kUInt8);
      case 1:
        return run_images_of<float, Output>(bytes, DType::kFloat32);
      default:
        return run_images_of<Output, Output>(bytes, Format<Output>::dtype);
    }
  });
}

}  // namespace

// libFuzzer ends the process without writing what is buffered: the message of expect_near().
extern "C" int LLVMFuzzerInitialize(int*, char***) { return std::setvbuf(stdout, nullptr, _IONBF, 0); }

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  schedule = {bytes.pick({1, 2, 3, 64}), bytes.flag(), bytes.pick({INT64_MAX, int64_t{0}, int64_t{1} << 10})};
  using Run = void (*)(Bytes&);
  constexpr Run kRuns[] = {run_norms,  run_norms,    run_norms,  run_norms, run_statistics_of_any_values,
                           run_others, run_integers, run_counts, run_images};
  bytes.pick(kRuns)(bytes);
  return 0;
}
