#include "kernels/cpu/value_counts.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <type_traits>

namespace normfused::cpu {

namespace {

// A rounded value as the upper 32 bits of its double, whose lower 32 bits are 0.
using Key = uint32_t;

constexpr Key kNonfinite = 0x7ff00000, kSign = 0x80000000;

Key upper_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<Key>(bits >> 32);
}

double value_of(Key key) {
  const uint64_t bits = uint64_t{key} << 32;
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The key of the value rounded to 11 significant bits. Infinities and NaNs have keys with the exponent kNonfinite.
Key rounded(double value) {
  constexpr int kBits = 42;  // of the 52 bits of the significand after the leading one
  constexpr uint64_t kHalf = uint64_t{1} << (kBits - 1);
  constexpr Key kUnit = Key{1} << (kBits - 32);
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const bool is_finite = (static_cast<Key>(bits >> 32) & kNonfinite) != kNonfinite;
  Key key = static_cast<Key>((bits + (is_finite ? kHalf : 0)) >> 32) & -kUnit;
  if (is_finite && (key & kNonfinite) == kNonfinite) key -= kUnit;  // rounded up to infinity
  return key == kSign ? 0 : key;                                    // -0 equals 0
}

template <class T>
Key key_of(T value) {
  if constexpr (std::is_integral_v<T>) {
    constexpr int64_t kLow = -(1 << 15), kHigh = 1 << 16;
    if (value >= kLow && value < kHigh) return upper_bits(static_cast<double>(value));
  }
  return rounded(static_cast<double>(value));
}

// Counts of keys: a hash table with open addressing, of which at most half is in use.
class KeyCounts {
 public:
  template <class T>
  void add(T value) {
    const Key key = key_of(value);
    if (!std::is_integral_v<T> && (key & kNonfinite) == kNonfinite) return;
    Slot& slot = find(key);
    if (slot.count++ == 0) {
      slot.key = key;
      if (2 * ++used_ > slots_.size()) grow();
    }
  }

  template <class T>
  void add_row(const T* values, int64_t n) {
    for (int64_t i = 0; i < n; ++i) add(values[i]);
  }

  template <class F>
  void for_each(const F& f) const {
    for (const Slot& slot : slots_)
      if (slot.count > 0) f(value_of(slot.key), slot.count);
  }

 private:
  struct Slot {
    Key key;
    uint32_t count;
  };

  Slot& find(Key key) {
    const size_t last = slots_.size() - 1;
    size_t index = key * 0x9e3779b1u >> shift_;  // Knuth's multiplicative hash
    while (slots_[index].count > 0 && slots_[index].key != key) index = (index + 1) & last;
    return slots_[index];
  }

  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    --shift_;
    for (const Slot& slot : old)
      if (slot.count > 0) find(slot.key) = slot;
  }

  static constexpr int kFirstBits = 6;
  std::vector<Slot> slots_ = std::vector<Slot>(1 << kFirstBits);
  int shift_ = 32 - kFirstBits;
  size_t used_ = 0;
};

// Counts of bytes. Neighbors are counted in different copies: an increment waits for the previous one of its counter.
template <class T>
class ByteCounts {
 public:
  void add(T value) { add(value, 0); }
  void add(T value, int copy) { ++copies_[copy][static_cast<uint8_t>(value)]; }

  void add_row(const T* values, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, values + i, sizeof(eight));
      for (int k = 0; k < 8; ++k) ++copies_[k % kCopies][eight >> 8 * k & 0xff];
    }
    for (; i < n; ++i) add(values[i]);
  }

  template <class F>
  void for_each(const F& f) const {
    for (int byte = 0; byte < 256; ++byte) {
      uint32_t count = 0;
      for (const auto& copy : copies_) count += copy[byte];
      if (count > 0) f(static_cast<double>(static_cast<T>(byte)), count);
    }
  }

 private:
  static constexpr int kCopies = 4;
  std::array<std::array<uint32_t, 256>, kCopies> copies_{};
};

template <class T>
using Counts = std::conditional_t<sizeof(T) == 1, ByteCounts<T>, KeyCounts>;

// A range of channels and positions, which one task counts.
struct Block {
  int64_t c0, c1, m0, m1;
};

// Blocks of at least 2^18 values where there are so many, and at most 32 of them: each has counts of its own, which are
// added in the end. With channels first and many channels, a block has all positions of some channels.
std::vector<Block> blocks_of(const ChannelView& view) {
  constexpr int64_t kMaxBlocks = 32, kMinValues = 1 << 18;
  const bool by_channels = view.inner > 1 && view.channels >= kMaxBlocks;
  const int64_t whole = by_channels ? view.channels : view.positions();
  const int64_t blocks = std::min(std::clamp(view.numel() / kMinValues, int64_t{1}, kMaxBlocks), whole);
  std::vector<Block> result;
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t first = whole * k / blocks, last = whole * (k + 1) / blocks;
    result.push_back(by_channels ? Block{first, last, 0, whole == 0 ? 0 : view.positions()}
                                 : Block{0, view.channels, first, last});
  }
  return result;
}

template <class T>
void count_block(const T* input, const ChannelView& view, const Block& block, Counts<T>* counts) {
  if (view.inner == 1 && view.channels > 1) {
    const T* values = input + block.m0 * view.channels;
    for (int64_t m = block.m0; m < block.m1; ++m, values += view.channels)
      for (int64_t c = 0; c < view.channels; ++c) counts[c].add(values[c]);
    return;
  }
  for (int64_t m = block.m0, end; m < block.m1; m = end) {
    const int64_t outer = m / view.inner, inner = m % view.inner;
    end = std::min(block.m1, m + view.inner - inner);
    for (int64_t c = block.c0; c < block.c1; ++c)
      counts[c - block.c0].add_row(input + (outer * view.channels + c) * view.inner + inner, end - m);
  }
}

// Sorts by value, and adds the counts of equal values.
void combine(std::vector<ValueCount>& counts) {
  std::sort(counts.begin(), counts.end(), [](const auto& a, const auto& b) { return a.value < b.value; });
  size_t used = 0;
  for (const ValueCount& next : counts) {
    if (used > 0 && counts[used - 1].value == next.value)
      counts[used - 1].count += next.count;
    else
      counts[used++] = next;
  }
  counts.resize(used);
}

template <class T>
std::vector<std::vector<ValueCount>> value_counts(const ValueCounts& args, const Parallel& parallel) {
  const std::vector<Block> blocks = blocks_of(args.view);
  std::vector<std::vector<std::vector<ValueCount>>> parts(blocks.size());
  parallel(static_cast<int64_t>(blocks.size()), 1, [&](int64_t index) {
    const Block& block = blocks[index];
    std::vector<Counts<T>> counts(block.c1 - block.c0);
    count_block(static_cast<const T*>(args.input), args.view, block, counts.data());
    for (const Counts<T>& channel : counts) {
      parts[index].emplace_back();
      channel.for_each([&](double value, int64_t count) { parts[index].back().push_back({value, count}); });
    }
  });
  std::vector<std::vector<ValueCount>> result(args.view.channels);
  for (size_t index = 0; index < blocks.size(); ++index)
    for (size_t c = 0; c < parts[index].size(); ++c) {
      std::vector<ValueCount>& channel = result[blocks[index].c0 + c];
      channel.insert(channel.end(), parts[index][c].begin(), parts[index][c].end());
    }
  for (std::vector<ValueCount>& channel : result) combine(channel);
  return result;
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
