#include "kernels/cpu/value_counts.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <mutex>
#include <type_traits>

namespace normfused::cpu {

namespace {

// A rounded value as a number. Of a floating value it is the upper 22 bits of its double: sign, exponent, and 10 bits
// of the significand. The exact integers follow.
using Index = uint32_t;

constexpr int kDroppedBits = 64 - 22;
constexpr Index kNonfinite = 0x7ff << 10, kIntegers = 1 << 22;
constexpr int64_t kLowest = -(1 << 15), kExactIntegers = (1 << 15) + (1 << 16);

uint64_t bits_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

double value_of(Index index) {
  if (index >= kIntegers) return static_cast<double>(static_cast<int64_t>(index - kIntegers) + kLowest);
  const uint64_t bits = uint64_t{index} << kDroppedBits;
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// kNonfinite for infinities and NaNs. Adding half of the last digit rounds to the nearest.
Index index_of(double value) {
  constexpr uint64_t kHalf = uint64_t{1} << (kDroppedBits - 1);
  const auto truncated = static_cast<Index>(bits_of(value) >> kDroppedBits);
  if ((truncated & kNonfinite) == kNonfinite) return kNonfinite;
  const auto index = static_cast<Index>((bits_of(value) + kHalf) >> kDroppedBits);
  return (index & kNonfinite) == kNonfinite ? truncated : index;  // not rounded up to infinity
}

Index index_of(float value) { return index_of(static_cast<double>(value)); }

template <class T>
std::enable_if_t<std::is_integral_v<T>, Index> index_of(T value) {
  const uint64_t offset = static_cast<uint64_t>(value) - static_cast<uint64_t>(kLowest);
  return offset < kExactIntegers ? kIntegers + static_cast<Index>(offset) : index_of(static_cast<double>(value));
}

// Counters of indices, in pages of 1024, which are added when they are needed: the values of one sign and exponent, or
// 1024 integers.
class PagedCounts {
 public:
  template <class T>
  void add(T value) {
    const Index index = index_of(value);
    if (index != kNonfinite) counter(index) += 1;
  }

  template <class T>
  void add_row(const T* values, int64_t n) {
    for (int64_t i = 0; i < n; ++i) add(values[i]);
  }

  void add_counts(const PagedCounts& other) {
    other.for_each([&](Index index, uint32_t count) { counter(index) += count; });
  }

  // In ascending order.
  std::vector<ValueCount> values() const {
    std::vector<ValueCount> result;
    for_each([&](Index index, uint32_t count) { result.push_back({value_of(index) + 0.0, count}); });  // 0 for -0
    std::sort(result.begin(), result.end(), [](const auto& a, const auto& b) { return a.value < b.value; });
    // Two indices have the same value: 0 and -0, or an exact integer and a larger one that is rounded to it.
    size_t used = 0;
    for (const ValueCount& next : result) {
      if (used > 0 && result[used - 1].value == next.value)
        result[used - 1].count += next.count;
      else
        result[used++] = next;
    }
    result.resize(used);
    return result;
  }

 private:
  static constexpr Index kPage = 1024;
  static constexpr size_t kPages = (kIntegers + kExactIntegers) / kPage;

  uint32_t& counter(Index index) {
    uint16_t& page = pages_[index / kPage];
    if (page == 0) {
      page = static_cast<uint16_t>(counters_.size() / kPage + 1);
      counters_.resize(counters_.size() + kPage);
    }
    return counters_[(page - 1) * kPage + index % kPage];
  }

  template <class F>
  void for_each(const F& f) const {
    for (Index page = 0; page < kPages; ++page)
      for (Index k = 0; pages_[page] > 0 && k < kPage; ++k)
        if (const uint32_t count = counters_[(pages_[page] - 1) * kPage + k]) f(page * kPage + k, count);
  }

  std::array<uint16_t, kPages> pages_{};  // the number of each page in counters_, from 1; 0: absent
  std::vector<uint32_t> counters_;
};

// Counts of bytes. An increment waits for the previous one of its counter, so neighbors in a row have different ones,
// and eight equal bytes are counted at once.
template <class T>
class ByteCounts {
 public:
  void add(T value) { ++copies_[0][static_cast<uint8_t>(value)]; }

  void add_row(const T* values, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, values + i, sizeof(eight));
      if (eight == (eight << 8 | eight >> 56))
        copies_[0][eight & 0xff] += 8;
      else
        for (int k = 0; k < 8; ++k) ++copies_[k % kCopies][eight >> 8 * k & 0xff];
    }
    for (; i < n; ++i) add(values[i]);
  }

  void add_counts(const ByteCounts& other) {
    for (int copy = 0; copy < kCopies; ++copy)
      for (int byte = 0; byte < 256; ++byte) copies_[copy][byte] += other.copies_[copy][byte];
  }

  // In ascending order.
  std::vector<ValueCount> values() const {
    std::vector<ValueCount> result;
    for (int value = std::numeric_limits<T>::min(); value <= std::numeric_limits<T>::max(); ++value) {
      uint32_t count = 0;
      for (const auto& copy : copies_) count += copy[static_cast<uint8_t>(value)];
      if (count > 0) result.push_back({static_cast<double>(value), count});
    }
    return result;
  }

 private:
  static constexpr int kCopies = 4;
  std::array<std::array<uint32_t, 256>, kCopies> copies_{};
};

// A range of channels and positions.
struct Block {
  int64_t c0, c1, m0, m1;
};

// Channels last. `channels` is a compile-time constant or a number.
template <class Counts, class T, class Channels>
void count_pixels(const T* values, int64_t n, Channels channels, Counts* counts) {
  for (int64_t m = 0; m < n; ++m, values += channels)
    for (int64_t c = 0; c < channels; ++c) counts[c].add(values[c]);
}

template <class Counts, class T>
void count_block(const T* input, const ChannelView& view, const Block& block, Counts* counts) {
  const int64_t channels = view.channels;
  if (view.inner == 1) {
    const T* values = input + block.m0 * channels;
    const int64_t n = block.m1 - block.m0;
    if (channels == 1) return counts->add_row(values, n);
    if (channels == 3) return count_pixels(values, n, std::integral_constant<int64_t, 3>{}, counts);
    return count_pixels(values, n, channels, counts);
  }
  for (int64_t m = block.m0, end; m < block.m1; m = end) {
    const int64_t outer = m / view.inner, inner = m % view.inner;
    end = std::min(block.m1, m + view.inner - inner);
    for (int64_t c = block.c0; c < block.c1; ++c)
      counts[c - block.c0].add_row(input + (outer * channels + c) * view.inner + inner, end - m);
  }
}

// Each thread has counts of its own, of a range of positions; of channels if they are contiguous and many.
template <class Counts, class T>
std::vector<std::vector<ValueCount>> count_tensor(const T* input, const ChannelView& view, const Parallel& parallel) {
  constexpr int64_t kMinValues = 1 << 18, kManyChannels = 32;
  const bool by_channels = view.inner > 1 && view.channels >= kManyChannels;
  const int64_t tasks = by_channels ? view.channels : view.positions();
  const int64_t values = by_channels ? view.positions() : view.channels;
  std::vector<Counts> total(view.channels);
  std::mutex mutex;
  parallel.ranges(
      tasks, std::max(kMinValues / std::max(values, int64_t{1}), int64_t{1}), [&](int64_t begin, int64_t end) {
        const Block block = by_channels ? Block{begin, end, 0, view.positions()} : Block{0, view.channels, begin, end};
        std::vector<Counts> counts(block.c1 - block.c0);
        count_block(input, view, block, counts.data());
        const std::lock_guard<std::mutex> lock(mutex);
        for (int64_t c = block.c0; c < block.c1; ++c) total[c].add_counts(counts[c - block.c0]);
      });
  std::vector<std::vector<ValueCount>> result;
  for (const Counts& channel : total) result.push_back(channel.values());
  return result;
}

template <class T>
std::vector<std::vector<ValueCount>> value_counts(const ValueCounts& args, const Parallel& parallel) {
  const T* const input = static_cast<const T*>(args.input);
  ChannelView view = args.view;
  if (view.channels == 1) view = {1, 1, view.positions()};  // one row
  using Counts = std::conditional_t<sizeof(T) == 1, ByteCounts<T>, PagedCounts>;
  return count_tensor<Counts>(input, view, parallel);
}

}  // namespace

std::vector<std::vector<ValueCount>> value_counts(const ValueCounts& args, const Parallel& parallel) {
  switch (args.dtype) {
    case DType::kUInt8:
      return value_counts<uint8_t>(args, parallel);
    case DType::kInt8:
      return value_counts<int8_t>(args, parallel);
    case DType::kInt16:
      return value_counts<int16_t>(args, parallel);
    case DType::kInt32:
      return value_counts<int32_t>(args, parallel);
    case DType::kInt64:
      return value_counts<int64_t>(args, parallel);
    case DType::kFloat64:
      return value_counts<double>(args, parallel);
    default:
      return value_counts<float>(args, parallel);
  }
}

}  // namespace normfused::cpu
