#include "memory/pool.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

#include "memory/poison.h"

namespace normfused::memory {

namespace {

// Memory stays in the pool for one to two windows after it was last needed: long enough for a training step, and
// short enough that faulting all of it again costs little per window (65 ms per GB).
constexpr int64_t kWindowSeconds = 30;

constexpr std::size_t in_pages(std::size_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }

}  // namespace

Block Pool::allocate(std::size_t bytes) {
  bytes = in_pages(bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  update_peaks();
  char* data = reuse(bytes);
  const bool reused = data != nullptr;
  if (!reused) data = map(bytes);
  if (data == nullptr) return {};
  try {
    live_.emplace(data, bytes);
  } catch (...) {
    system_.unmap(data, bytes);
    throw;
  }
  live_bytes_ += bytes;
  ++allocations_;
  if (reused) ++reuses_;
  update_peaks();
  trim(max_cached_bytes());  // memory was mapped although some is free: too little, or in pieces
  unpoison(data, bytes);
  return {data, bytes, !reused};
}

// The first bytes of the smallest free range that has so many, or null.
char* Pool::reuse(std::size_t bytes) {
  auto best = free_.end();
  for (auto range = free_.begin(); range != free_.end(); ++range)
    if (range->second.bytes >= bytes && (best == free_.end() || range->second.bytes < best->second.bytes)) best = range;
  if (best == free_.end()) return nullptr;
  auto node = free_.extract(best);  // a node that moves allocates nothing
  char* const data = node.key();
  Free& rest = node.mapped();
  resize(rest, rest.bytes - bytes, rest.warm_bytes - std::min(rest.warm_bytes, bytes));
  if (rest.bytes > 0) {
    node.key() += bytes;
    free_.insert(std::move(node));
  }
  return data;
}

char* Pool::map(std::size_t bytes) {
  void* data = system_.map(bytes);
  if (data == nullptr && !free_.empty()) {  // free memory may be what is missing
    trim(0);
    data = system_.map(bytes);
  }
  return static_cast<char*>(data);
}

void Pool::release(void* data) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  update_peaks();
  const auto block = live_.find(data);
  const std::size_t bytes = block->second;
  live_.erase(block);
  live_bytes_ -= bytes;
  try {
    insert_free(static_cast<char*>(data), bytes);
  } catch (const std::bad_alloc&) {  // no memory for its record
    system_.unmap(data, bytes);
  }
  trim(max_cached_bytes());
  make_reclaimable(max_warm_bytes());
}

// Adds a warm range, merged with its neighbours. Reclaimable memory before warm memory counts as warm.
void Pool::insert_free(char* data, std::size_t bytes) {
  auto range = free_.emplace(data, Free{bytes, bytes, ++releases_}).first;
  free_bytes_ += bytes;
  warm_bytes_ += bytes;
  poison(data, bytes);
  const auto extend = [this](Free& range, const Free& next) {
    const std::size_t warm_bytes = next.warm_bytes > 0 ? range.bytes + next.warm_bytes : range.warm_bytes;
    warm_bytes_ += warm_bytes - range.warm_bytes - next.warm_bytes;
    range = {range.bytes + next.bytes, warm_bytes, std::max(range.freed, next.freed)};
  };
  if (const auto next = std::next(range); next != free_.end() && data + bytes == next->first) {
    extend(range->second, next->second);
    free_.erase(next);
  }
  if (range == free_.begin()) return;
  if (const auto previous = std::prev(range); previous->first + previous->second.bytes == data) {
    extend(previous->second, range->second);
    free_.erase(range);
  }
}

void Pool::resize(Free& range, std::size_t bytes, std::size_t warm_bytes) {
  free_bytes_ -= range.bytes - bytes;
  warm_bytes_ -= range.warm_bytes - warm_bytes;
  range.bytes = bytes;
  range.warm_bytes = warm_bytes;
}

void Pool::unmap_end(FreeRanges::iterator range, std::size_t bytes) {
  const std::size_t left = range->second.bytes - bytes;
  resize(range->second, left, std::min(range->second.warm_bytes, left));
  char* const data = range->first + left;
  unpoison(data, bytes);
  system_.unmap(data, bytes);
  if (left == 0) free_.erase(range);
}

// Makes warm memory reclaimable until no more than this is left: the ends of the largest ranges, because allocations
// take the beginnings of the smallest. What cannot be reclaimable is unmapped.
void Pool::make_reclaimable(std::size_t max_warm_bytes) {
  while (warm_bytes_ > max_warm_bytes) {
    const auto largest = std::max_element(free_.begin(), free_.end(), [](const auto& a, const auto& b) {
      return a.second.warm_bytes < b.second.warm_bytes;
    });
    Free& range = largest->second;
    const std::size_t bytes = std::min(range.warm_bytes, in_pages(warm_bytes_ - max_warm_bytes));
    const std::size_t left = range.warm_bytes - bytes;
    if (system_.make_reclaimable(largest->first + left, bytes))
      resize(range, range.bytes, left);
    else
      unmap_end(largest, range.bytes);
  }
}

// Unmaps free memory, the oldest first, until no more than this is left.
void Pool::trim(std::size_t max_cached_bytes) {
  while (free_bytes_ > max_cached_bytes) {
    const auto oldest = std::min_element(free_.begin(), free_.end(),
                                         [](const auto& a, const auto& b) { return a.second.freed < b.second.freed; });
    unmap_end(oldest, std::min(oldest->second.bytes, in_pages(free_bytes_ - max_cached_bytes)));
  }
}

void Pool::update_peaks() {
  const int64_t window = system_.seconds() / kWindowSeconds;
  if (window != window_) {
    previous_peak_ = window == window_ + 1 ? window_peak_ : live_bytes_;
    window_peak_ = live_bytes_;
    window_ = window;
  }
  window_peak_ = std::max(window_peak_, live_bytes_);
  total_peak_ = std::max(total_peak_, live_bytes_);
}

std::size_t Pool::max_cached_bytes() {
  return std::min(system_.max_cached_bytes(), std::max(previous_peak_, window_peak_) - live_bytes_);
}

std::size_t Pool::max_warm_bytes() { return std::max(kMinWarmBytes, system_.max_cached_bytes() / kWarmShare); }

void Pool::empty_cache() {
  const std::lock_guard<std::mutex> lock(mutex_);
  trim(0);
}

PoolStats Pool::stats() {
  const std::lock_guard<std::mutex> lock(mutex_);
  update_peaks();
  trim(max_cached_bytes());
  return {live_bytes_, total_peak_, free_bytes_, max_cached_bytes(), allocations_, reuses_};
}

}  // namespace normfused::memory
