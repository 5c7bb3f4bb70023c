// Tickets: counters in device memory that tell a block whether it is the last to arrive. They are zero before and after
// each launch. Launches that follow one another can therefore share them; launches that can run concurrently must not.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

namespace normfused::cuda {

// Launches with equal keys never run concurrently: those of one stream, and in a graph those captured from one stream,
// because a graph does not run concurrently with itself.
struct TicketKey {
  int device;
  uint64_t stream;   // cudaStreamGetId: unique in the process, while handles are reused
  uint64_t thread;   // for the per-thread default stream; otherwise 0
  uint64_t capture;  // the graph capture; 0 if the launch is not captured

  friend bool operator<(const TicketKey& a, const TicketKey& b) {
    return std::tie(a.device, a.stream, a.thread, a.capture) < std::tie(b.device, b.stream, b.thread, b.capture);
  }
};

// Assigns every key a range of tickets that no other key shares. Ranges are never freed: a launch may be pending, and a
// graph may be replayed at any time. A range is a few hundred bytes.
class Tickets {
 public:
  using Zeros = std::function<unsigned*(int device, int64_t count)>;

  // `zeros` returns zeroed device memory that is never freed.
  explicit Tickets(Zeros zeros) : zeros_(std::move(zeros)) {}

  // The key's range, grown to at least `count` tickets. Thread-safe.
  unsigned* of(const TicketKey& key, int64_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Range& range = ranges_[key];
    if (range.count < count) {
      int64_t rounded = kMinRange;
      while (rounded < count) rounded *= 2;
      range = allocate(key.device, rounded);
    }
    return range.first;
  }

 private:
  struct Range {
    unsigned* first = nullptr;
    int64_t count = 0;
  };
  static constexpr int64_t kMinRange = 64;             // two cache lines: streams do not contend for one
  static constexpr int64_t kBlock = int64_t{1} << 16;  // tickets allocated at once, from which ranges are cut

  Range allocate(int device, int64_t count) {
    Range& unused = unused_[device];
    if (unused.count < count) {
      const int64_t block = count > kBlock ? count : kBlock;
      unused = {zeros_(device, block), block};
    }
    const Range range{unused.first, count};
    unused = {unused.first + count, unused.count - count};
    return range;
  }

  Zeros zeros_;
  std::mutex mutex_;
  std::map<TicketKey, Range> ranges_;
  std::map<int, Range> unused_;  // by device
};

}  // namespace normfused::cuda
