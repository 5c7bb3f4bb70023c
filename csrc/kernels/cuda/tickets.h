// Which tickets a launch counts with. Tickets are zero before a launch and after it, so launches that follow one
// another can share them, and launches that can run at the same time must not.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

namespace normfused::cuda {

// Launches with equal keys never run at the same time: those of one stream, and in a graph those captured from one
// stream, because a graph does not run concurrently with itself.
struct TicketKey {
  int device;
  uint64_t stream;   // unique in the process; a handle is not, as it is reused
  uint64_t thread;   // for a stream that each thread has one of; else 0
  uint64_t capture;  // 0: the launch is not captured

  friend bool operator<(const TicketKey& a, const TicketKey& b) {
    return std::tie(a.device, a.stream, a.thread, a.capture) < std::tie(b.device, b.stream, b.thread, b.capture);
  }
};

// Gives each key a range of its own, for good. Nothing is freed: a launch may be pending, and a graph may be replayed
// at any time. A range is a few hundred bytes.
class Tickets {
 public:
  using Zeros = std::function<unsigned*(int device, int64_t count)>;

  // `zeros` returns device memory that is zero and is never freed.
  explicit Tickets(Zeros zeros) : zeros_(std::move(zeros)) {}

  // At least `count` tickets. Callable from any thread.
  unsigned* of(const TicketKey& key, int64_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Range& range = ranges_[key];
    if (range.count < count) {
      int64_t rounded = kLeast;
      while (rounded < count) rounded *= 2;
      range = take(key.device, rounded);
    }
    return range.first;
  }

 private:
  struct Range {
    unsigned* first = nullptr;
    int64_t count = 0;
  };
  static constexpr int64_t kLeast = 64;                // two cache lines: streams do not contend for one
  static constexpr int64_t kBlock = int64_t{1} << 16;  // of memory, from which ranges are cut

  Range take(int device, int64_t count) {
    Range& rest = rests_[device];
    if (rest.count < count) {
      const int64_t block = count > kBlock ? count : kBlock;
      rest = {zeros_(device, block), block};
    }
    const Range range{rest.first, count};
    rest = {rest.first + count, rest.count - count};
    return range;
  }

  Zeros zeros_;
  std::mutex mutex_;
  std::map<TicketKey, Range> ranges_;
  std::map<int, Range> rests_;
};

}  // namespace normfused::cuda
