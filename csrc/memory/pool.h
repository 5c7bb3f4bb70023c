// A pool of memory for the outputs of operators on the CPU. It includes no torch header.
//
// A new output of 100 MB costs more time in page faults than in arithmetic. The pool reuses the memory of freed
// outputs. Most free memory is reclaimable: the system may take the pages whenever it needs them. The rest is warm. The
// pool keeps no more memory than the outputs of the last minute used at the same time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>

namespace normfused::memory {

// The unit of allocation: a huge page of x86-64 and of most AArch64 systems.
inline constexpr std::size_t kPageBytes = std::size_t{2} << 20;

// How much free memory may be warm: this much, as in glibc's malloc, which keeps up to 64 MiB, or this share of what
// the pool may keep. To make pages reclaimable interrupts the other threads of the process, and the next write to them
// is slower: batch norm in evaluation took 1.3 times as long when each of its outputs, 103 MB, had been reclaimable.
inline constexpr std::size_t kMinWarmBytes = std::size_t{32} << 20, kWarmShare = 16;

// What the pool requires of the operating system. Its functions are called by one thread at a time.
class System {
 public:
  virtual ~System() = default;

  // New memory at a multiple of kPageBytes, or null if there is none. `bytes` is a multiple of kPageBytes in all
  // functions.
  virtual void* map(std::size_t bytes) = 0;

  // Any part of mapped memory.
  virtual void unmap(void* data, std::size_t bytes) = 0;

  // From now on the system may take the pages, until they are written to again. Returns false if it cannot do that.
  virtual bool make_reclaimable(void* data, std::size_t bytes) = 0;

  // The bound on free memory that the pool may keep, at this moment.
  virtual std::size_t max_cached_bytes() = 0;

  virtual int64_t seconds() = 0;  // of a monotonic clock
};

struct PoolStats {
  std::size_t allocated_bytes;       // of blocks in use
  std::size_t peak_allocated_bytes;  // since the pool was created
  std::size_t cached_bytes;          // of free blocks
  std::size_t max_cached_bytes;      // the bound on cached_bytes at this moment
  uint64_t allocations;
  uint64_t reuses;  // allocations that were served from free blocks
};

struct Block {
  void* data = nullptr;  // null: the system has no memory
  std::size_t bytes = 0;
  bool is_new = false;  // its pages have never been written to
};

// Thread-safe. Free memory is a set of address ranges: an allocation takes the smallest range that is large enough, and
// returns the rest of it; a freed block is merged with its neighbours.
class Pool {
 public:
  explicit Pool(System& system) : system_(system) {}

  // A block of at least `bytes` bytes, uninitialized. Throws std::bad_alloc if its record cannot be stored.
  Block allocate(std::size_t bytes);

  // Frees a block of allocate(), from any thread.
  void release(void* data) noexcept;

  // Returns all free memory to the system.
  void empty_cache();

  PoolStats stats();

  // Around fork(): the child must not inherit a mutex that another thread has locked.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Free {
    std::size_t bytes;
    std::size_t warm_bytes;  // those after them are reclaimable
    uint64_t freed;          // sequence number of the newest release in it
  };
  using FreeRanges = std::map<char*, Free>;  // by address; no two are adjacent

  char* reuse(std::size_t bytes);
  char* map(std::size_t bytes);
  void insert_free(char* data, std::size_t bytes);
  void resize(Free& range, std::size_t bytes, std::size_t warm_bytes);
  void unmap_end(FreeRanges::iterator range, std::size_t bytes);
  void make_reclaimable(std::size_t max_warm_bytes);
  void trim(std::size_t max_cached_bytes);
  void update_peaks();
  std::size_t max_cached_bytes();
  std::size_t max_warm_bytes();

  std::mutex mutex_;
  System& system_;
  FreeRanges free_;
  std::unordered_map<void*, std::size_t> live_;
  std::size_t live_bytes_ = 0, free_bytes_ = 0, warm_bytes_ = 0;
  // The maximum of live_bytes_ in the current window of time, in the one before it, and of all time.
  std::size_t window_peak_ = 0, previous_peak_ = 0, total_peak_ = 0;
  int64_t window_ = 0;
  uint64_t releases_ = 0, allocations_ = 0, reuses_ = 0;
};

}  // namespace normfused::memory
