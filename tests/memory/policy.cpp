// The policy of the memory pool against a simulated system: who owns each page, and how much is kept for how long.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <vector>

#include "memory/pool.h"

using normfused::memory::Block;
using normfused::memory::kMinWarmBytes;
using normfused::memory::kPageBytes;
using normfused::memory::kWarmShare;
using normfused::memory::Pool;
using normfused::memory::PoolStats;
using normfused::memory::System;

namespace {

#define REQUIRE(condition)                                               \
  do {                                                                   \
    if (!(condition)) {                                                  \
      std::printf("FAILED %s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                      \
    }                                                                    \
  } while (false)

constexpr std::size_t kMiB = std::size_t{1} << 20;

// Pages are numbers that nobody accesses. The system knows the owner of each.
class SimulatedSystem final : public System {
 public:
  void* map(std::size_t bytes) override {
    REQUIRE(bytes > 0 && bytes % kPageBytes == 0);
    if (mapped_bytes + bytes > capacity) return nullptr;
    // Sometimes next to the last mapping, as mmap does, sometimes apart.
    if (++maps_ % 3 == 0) next_ += kPageBytes;
    const std::size_t first = next_;
    next_ += bytes;
    for (std::size_t page = first; page < next_; page += kPageBytes) state_[page] = State::kMapped;
    mapped_bytes += bytes;
    return reinterpret_cast<void*>(first);
  }

  void unmap(void* data, std::size_t bytes) override {
    each_page(data, bytes, [&](std::size_t page) {
      REQUIRE(state_.count(page) == 1 && state_[page] != State::kUsed);
      state_.erase(page);
    });
    mapped_bytes -= bytes;
  }

  bool make_reclaimable(void* data, std::size_t bytes) override {
    ++reclaimable_calls;
    each_page(data, bytes, [&](std::size_t page) {
      REQUIRE(state_.at(page) != State::kUsed);
      if (reclaimable) state_[page] = State::kReclaimable;
    });
    return reclaimable;
  }

  // Memory that is mapped, free and not reclaimable.
  std::size_t warm_bytes() const {
    return kPageBytes * static_cast<std::size_t>(std::count_if(state_.begin(), state_.end(), [](const auto& page) {
             return page.second == State::kMapped;
           }));
  }

  std::size_t max_cached_bytes() override { return limit; }
  int64_t seconds() override { return now; }

  // A block's owner: no page of it has another one.
  void use(const Block& block) {
    REQUIRE(reinterpret_cast<std::size_t>(block.data) % kPageBytes == 0 && block.bytes % kPageBytes == 0);
    each_page(block.data, block.bytes, [&](std::size_t page) {
      REQUIRE(state_.at(page) != State::kUsed);
      state_[page] = State::kUsed;
    });
  }
  void leave(const Block& block) {
    each_page(block.data, block.bytes, [&](std::size_t page) {
      REQUIRE(state_.at(page) == State::kUsed);
      state_[page] = State::kMapped;
    });
  }

  std::size_t capacity = std::size_t{1} << 50, limit = std::size_t{1} << 50, mapped_bytes = 0;
  int64_t now = 1000;
  bool reclaimable = true;
  int reclaimable_calls = 0;

 private:
  enum class State { kMapped, kReclaimable, kUsed };

  template <class F>
  void each_page(void* data, std::size_t bytes, F body) {
    const auto first = reinterpret_cast<std::size_t>(data);
    REQUIRE(bytes % kPageBytes == 0);
    for (std::size_t page = first; page < first + bytes; page += kPageBytes) body(page);
  }

  std::map<std::size_t, State> state_;
  std::size_t next_ = std::size_t{1} << 40;
  int maps_ = 0;
};

// A pool whose every call is checked.
class CheckedPool {
 public:
  explicit CheckedPool(SimulatedSystem& system) : system_(system), pool_(system) {}

  Block allocate(std::size_t bytes) {
    const std::size_t before = system_.mapped_bytes;
    const Block block = pool_.allocate(bytes);
    if (block.data == nullptr) return block;
    REQUIRE(block.bytes >= bytes && block.bytes < bytes + kPageBytes);
    REQUIRE(block.is_new || system_.mapped_bytes <= before);
    system_.use(block);
    live_ += block.bytes;
    peaks_.push_back({system_.now, live_});
    check();
    return block;
  }

  void release(const Block& block) {
    peaks_.push_back({system_.now, live_});
    system_.leave(block);
    pool_.release(block.data);
    live_ -= block.bytes;
    peaks_.push_back({system_.now, live_});
    check();
  }

  void empty_cache() {
    pool_.empty_cache();
    REQUIRE(system_.mapped_bytes == live_);
  }

  PoolStats stats() { return pool_.stats(); }

 private:
  struct Peak {
    int64_t seconds;
    std::size_t bytes;
  };

  // Everything that is mapped is in use or free; and no more is mapped than was in use at the peak of the last minute.
  void check() {
    while (peaks_.size() > 1 && peaks_[1].seconds < system_.now - 60) peaks_.erase(peaks_.begin());
    std::size_t peak = 0;
    for (const Peak& p : peaks_) peak = std::max(peak, p.bytes);
    if (peaks_.size() > 64) compact();
    REQUIRE(system_.mapped_bytes <= std::max(peak, live_));
    REQUIRE(system_.mapped_bytes - live_ <= system_.limit);
    REQUIRE(system_.warm_bytes() <= std::max(kMinWarmBytes, system_.limit / kWarmShare));
    const PoolStats stats = pool_.stats();
    REQUIRE(stats.allocated_bytes == live_);
    REQUIRE(stats.allocated_bytes + stats.cached_bytes == system_.mapped_bytes);
    REQUIRE(stats.cached_bytes <= stats.max_cached_bytes);
  }

  // Keeps the maximum of each second.
  void compact() {
    std::vector<Peak> kept;
    for (const Peak& p : peaks_)
      if (!kept.empty() && kept.back().seconds == p.seconds)
        kept.back().bytes = std::max(kept.back().bytes, p.bytes);
      else
        kept.push_back(p);
    kept.push_back({system_.now, live_});
    peaks_ = kept;
  }

  SimulatedSystem& system_;
  Pool pool_;
  std::size_t live_ = 0;
  std::vector<Peak> peaks_;
};

void equal_steps_map_memory_once() {
  SimulatedSystem system;
  CheckedPool pool(system);
  std::size_t after_first = 0;
  for (int step = 0; step < 50; ++step) {
    std::vector<Block> blocks;
    for (int i = 1; i <= 20; ++i) blocks.push_back(pool.allocate(i * kMiB * 3));
    for (const Block& block : blocks) pool.release(block);
    if (step == 0) after_first = system.mapped_bytes;
    REQUIRE(system.mapped_bytes == after_first);
    system.now += 7;
  }
  const PoolStats stats = pool.stats();
  REQUIRE(stats.allocations == 1000 && stats.reuses == 980);
}

void the_smallest_sufficient_range_is_used() {
  SimulatedSystem system;
  CheckedPool pool(system);
  const Block large = pool.allocate(20 * kMiB), wall = pool.allocate(2 * kMiB), small = pool.allocate(6 * kMiB);
  const Block wall2 = pool.allocate(2 * kMiB);
  pool.release(large);
  pool.release(small);
  REQUIRE(pool.allocate(5 * kMiB).data == small.data);
  REQUIRE(pool.allocate(7 * kMiB).data == large.data);
  pool.release(wall);
  pool.release(wall2);
}

void neighbours_merge_in_any_order() {
  for (int order = 0; order < 6; ++order) {
    SimulatedSystem system;
    CheckedPool pool(system);
    pool.release(pool.allocate(12 * kMiB));
    std::vector<Block> blocks;
    for (int i = 0; i < 3; ++i) blocks.push_back(pool.allocate(4 * kMiB));
    int indices[3] = {0, 1, 2};
    for (int i = 0; i < order; ++i) std::next_permutation(indices, indices + 3);
    for (const int i : indices) pool.release(blocks[i]);
    REQUIRE(!pool.allocate(12 * kMiB).is_new);
  }
}

void idle_memory_is_returned() {
  SimulatedSystem system;
  CheckedPool pool(system);
  const Block block = pool.allocate(100 * kMiB), other = pool.allocate(2 * kMiB);
  pool.release(block);
  REQUIRE(pool.stats().cached_bytes == 100 * kMiB);
  system.now += 61;
  REQUIRE(pool.stats().cached_bytes == 0);
  REQUIRE(system.mapped_bytes == other.bytes);
}

void limits_hold() {
  SimulatedSystem system;
  system.limit = 10 * kMiB;
  CheckedPool pool(system);
  pool.release(pool.allocate(64 * kMiB));
  REQUIRE(system.mapped_bytes == 10 * kMiB);
  system.limit = 0;  // the limit of the process changed
  const Block block = pool.allocate(8 * kMiB);
  REQUIRE(!block.is_new && system.mapped_bytes == block.bytes);
  pool.release(block);
  REQUIRE(system.mapped_bytes == 0);
}

void free_memory_gives_way_to_an_allocation() {
  SimulatedSystem system;
  system.capacity = 64 * kMiB;
  CheckedPool pool(system);
  const Block first = pool.allocate(30 * kMiB), wall = pool.allocate(2 * kMiB), second = pool.allocate(30 * kMiB);
  pool.release(first);
  pool.release(second);
  const Block larger = pool.allocate(40 * kMiB);  // only if both free ranges are unmapped
  REQUIRE(larger.data != nullptr);
  REQUIRE(pool.allocate(40 * kMiB).data == nullptr);
  pool.release(larger);
  pool.release(wall);
}

void memory_that_cannot_be_reclaimed_is_not_kept() {
  SimulatedSystem system;
  system.limit = 512 * kMiB;
  system.reclaimable = false;
  CheckedPool pool(system);
  pool.release(pool.allocate(34 * kMiB));
  REQUIRE(system.mapped_bytes == 0);
  pool.release(pool.allocate(8 * kMiB));  // few enough bytes to stay warm
  REQUIRE(system.mapped_bytes == 8 * kMiB);
}

void free_memory_is_warm_up_to_a_bound() {
  for (const std::size_t limit : {100 * kMiB, 512 * kMiB, 1600 * kMiB}) {
    SimulatedSystem system;
    system.limit = limit;
    const std::size_t bound = limit == 1600 * kMiB ? 100 * kMiB : 32 * kMiB;
    CheckedPool pool(system);
    for (int i = 0; i < 100; ++i) pool.release(pool.allocate(bound));
    REQUIRE(system.reclaimable_calls == 0);
    std::vector<Block> blocks;
    for (std::size_t i = 0; i < bound / (4 * kMiB) + 1; ++i) blocks.push_back(pool.allocate(4 * kMiB));
    for (const Block& block : blocks) pool.release(block);
    REQUIRE(system.reclaimable_calls == 1 && system.warm_bytes() == bound);
  }
}

// A block of a range that is larger than the bound is warm, and stays so.
void a_block_that_is_used_again_stays_warm() {
  SimulatedSystem system;
  system.limit = 512 * kMiB;
  CheckedPool pool(system);
  pool.release(pool.allocate(78 * kMiB));
  const Block blocks[] = {pool.allocate(26 * kMiB), pool.allocate(26 * kMiB), pool.allocate(26 * kMiB)};
  for (const int order : {2, 0, 1}) pool.release(blocks[order]);
  const int calls = system.reclaimable_calls;
  for (int i = 0; i < 100; ++i) pool.release(pool.allocate(26 * kMiB));
  REQUIRE(calls > 0 && system.reclaimable_calls <= calls + 1);
  REQUIRE(system.warm_bytes() >= 26 * kMiB);
}

void an_emptied_cache_keeps_blocks_in_use() {
  SimulatedSystem system;
  CheckedPool pool(system);
  const Block used = pool.allocate(8 * kMiB);
  pool.release(pool.allocate(6 * kMiB));
  pool.empty_cache();
  REQUIRE(system.mapped_bytes == used.bytes);
}

// Programs that train, evaluate and pause, with batches of varying size, for `hours` of simulated time.
void hours_of_varying_sizes(int hours, unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](int bound) { return static_cast<int>(random() % bound); };
  SimulatedSystem system;
  system.capacity = 3000 * kMiB;
  if (seed % 2 == 1) system.limit = 1000 * kMiB;
  CheckedPool pool(system);
  const int64_t end = system.now + hours * int64_t{3600};
  std::vector<std::size_t> layers;
  std::vector<Block> forgotten;  // outputs that live longer than a step
  int64_t change = 0;
  while (system.now < end) {
    if (system.now >= change) {
      layers.resize(2 + below(12));
      for (std::size_t& layer : layers) layer = kMiB + static_cast<std::size_t>(below(40)) * kMiB / 3;
      change = system.now + 60 + below(3600);
    }
    const bool training = below(4) > 0;
    const double batch = below(3) == 0 ? 0.25 + below(100) / 50.0 : 1;
    std::vector<Block> alive;
    for (const std::size_t layer : layers) {
      const Block block = pool.allocate(static_cast<std::size_t>(static_cast<double>(layer) * batch) + 1);
      if (block.data == nullptr) continue;
      if (training || below(20) == 0)
        alive.push_back(block);
      else
        pool.release(block);
    }
    if (below(50) == 0 && !alive.empty()) forgotten.push_back(alive.back()), alive.pop_back();
    if (below(3) == 0) std::shuffle(alive.begin(), alive.end(), random);
    while (!alive.empty()) pool.release(alive.back()), alive.pop_back();
    if (forgotten.size() > 8) {
      const auto chosen = forgotten.begin() + below(8);
      pool.release(*chosen);
      forgotten.erase(chosen);
    }
    system.now += below(200) == 0 ? below(7200) : below(4);
  }
  const PoolStats stats = pool.stats();
  std::printf("%d hours: %llu allocations, %.1f %% served from free blocks, peak %zu MiB\n", hours,
              static_cast<unsigned long long>(stats.allocations),
              100.0 * static_cast<double>(stats.reuses) / static_cast<double>(stats.allocations),
              stats.peak_allocated_bytes / kMiB);
  REQUIRE(stats.reuses * 10 > stats.allocations * 8);
}

}  // namespace

int main() {
  equal_steps_map_memory_once();
  the_smallest_sufficient_range_is_used();
  neighbours_merge_in_any_order();
  idle_memory_is_returned();
  limits_hold();
  free_memory_gives_way_to_an_allocation();
  memory_that_cannot_be_reclaimed_is_not_kept();
  free_memory_is_warm_up_to_a_bound();
  a_block_that_is_used_again_stays_warm();
  an_emptied_cache_keeps_blocks_in_use();
  for (unsigned seed = 0; seed < 4; ++seed) hours_of_varying_sizes(25, seed);
}
