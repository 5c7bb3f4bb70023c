// Decisions from the fuzzer's bytes, and a report that libFuzzer takes for a crash.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace normfused::fuzz {

// The bytes in order. After the last one all numbers are 0, so that every prefix of an input is an input.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}

  // A number of `bytes` bytes.
  uint64_t number(int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) value = value << 8 | (data_ < end_ ? *data_++ : 0);
    return value;
  }
  // A number from `low` to `high`, from one byte, or from more if the range needs more.
  int64_t between(int64_t low, int64_t high) {
    const auto range = static_cast<uint64_t>(high - low);
    return low + static_cast<int64_t>(number(range < 1 << 8 ? 1 : range < 1 << 16 ? 2 : 8) % (range + 1));
  }
  bool flag() { return number(1) & 1; }
  template <class T, size_t kCount>
  T pick(const T (&choices)[kCount]) {
    return choices[between(0, kCount - 1)];
  }
  // From 1 to `most`: every magnitude is as likely as every other, and numbers next to powers of two are frequent.
  int64_t extent(int64_t most) {
    const auto exponent = between(0, std::ilogb(static_cast<double>(most)));
    const int64_t power = int64_t{1} << exponent;
    const int64_t value = flag() ? power + between(-1, 1) : power + between(0, power - 1);
    return std::clamp<int64_t>(value, 1, most);
  }

 private:
  const uint8_t *data_, *end_;
};

}  // namespace normfused::fuzz
