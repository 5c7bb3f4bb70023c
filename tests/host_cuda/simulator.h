// The CUDA simulator: runs the threads of a launch on the CPU, each as a fiber, all on one OS thread. Fibers switch
// only where CUDA threads wait for each other, so a launch is repeatable. The simulator reports barriers that not all
// threads reach, shuffles from absent lanes, deadlocks and too much shared memory. Shared memory is initialized to NaN.
// AddressSanitizer detects accesses out of the bounds of shared and global memory. ThreadSanitizer detects races: it
// sees every fiber as a thread, ordered only by barriers, fences and atomics.
//
// Two environment variables choose a schedule:
//   CUDAHOST_ORDER     of lanes, warps and blocks: 0 ascending, 1 descending, others are the seed of a shuffle
//   CUDAHOST_RESIDENT  the maximum number of blocks, or clusters, that run at the same time; default 1. In a shuffled
//                      order the number is random up to it. A resident block runs until all of its threads wait, so
//                      that the others starve as long as the order allows.
//
// This file has the state of a launch and what its threads call; scheduler.h runs them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "fiber.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cudahost {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Config {
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic
  cudaStream_t stream = nullptr;
  bool cooperative = false;
  unsigned cluster = 1;   // blocks along x
  bool overlaps = false;  // may start before the previous launch has ended
};

// The source location of a call.
struct Place {
  const char* file;
  int line;
};
#define CUDAHOST_HERE ::cudahost::Place place = {__builtin_FILE(), __builtin_LINE()}

enum class State : uint8_t { kReady, kSpinning, kAtWarp, kAtBlock, kAtCluster, kAtGrid, kExited };
constexpr const char* kStateNames[] = {
    "ready", "spinning", "in a warp collective", "at __syncthreads", "at cluster sync", "at grid sync", "exited"};

// A barrier. It stores the votes of two successive rounds separately, because threads leave one round while others
// arrive at the next.
struct Barrier {
  Place place;
  unsigned arrived, round, votes[2];
};

// A warp collective of the lanes of one mask.
struct Exchange {
  const char* kind;
  unsigned mask, arrived, round, took_part[2];
  uint64_t values[2][32];
};

struct Warp {
  static constexpr unsigned kMaxMasks = 32;
  unsigned absent, exited;  // lanes that the block does not have; these and lanes that have exited
  unsigned masks;
  Exchange exchanges[kMaxMasks];
};

// An asynchronous copy of 16 bytes to shared memory, of which the last 16 - bytes become zero.
struct Copy {
  void* target;
  const void* source;
  int bytes;
  unsigned group;

  // Not hidden from ThreadSanitizer: the accesses are the kernel's.
  __attribute__((noinline)) void perform() const {
    std::memset(target, 0, 16);
    std::memcpy(target, source, static_cast<size_t>(bytes));
  }
};

struct Block;

struct Thread : Fiber {
  Block* block;
  uint3 index;
  unsigned rank;
  State state;
  Place place;  // where it waits
  Exchange* exchange;
  bool fenced, waited;  // waited: for the previous launch
  const void* seen;     // the location of its last atomic
  Copy* copies;         // that it has not waited for; not a std::vector, whose functions ThreadSanitizer would see
  unsigned copy_count, copy_groups;  // copy_groups: that it has ended
};

struct Block {
  uint3 index;
  Thread* threads;
  Warp* warps;
  char* shared;
  unsigned declared;  // a bit per shared variable that it has declared so far
  unsigned live;
  const void* seen;
  Barrier barrier, cluster_barrier;
};

// Every resident block has an arena of shared memory: dynamic memory, then static variables with gaps between them.
constexpr size_t kArenaBytes = 256 << 10, kMaxShared = 227 << 10, kMaxStatic = 48 << 10, kGap = 64;
// ThreadSanitizer's clocks lie at the end of the arena, which is new for each block. A clock that blocks share would
// order them.
constexpr size_t kClocks = 238 << 10;
enum Clock : unsigned { kBlockClock = 0, kClusterClock = 2, kGridClock = 4, kWarpClocks = 6 };

struct SharedVariable {
  const void* tag;
  size_t offset;
};

inline unsigned launches;           // since the program's start
inline unsigned concurrent;         // of these, the launches with several resident blocks or clusters
inline unsigned max_cluster = ~0u;  // a launch of larger clusters is refused

// At the end of the process, appends the number of launches to the file that CUDAHOST_LAUNCHES names: evidence that
// kernels ran, for tests/expectations.py.
struct LaunchRecord {
  ~LaunchRecord() {
    const char* const path = std::getenv("CUDAHOST_LAUNCHES");
    std::FILE* const file = path != nullptr ? std::fopen(path, "a") : nullptr;
    if (file == nullptr) return;
    std::fprintf(file, "%u\n", launches);
    std::fclose(file);
  }
};
inline const LaunchRecord launch_record;

// The state of the running launch; only one runs at a time.
struct Launch {
  Config config;
  void (*call)(void*);
  void* arguments;
  unsigned threads, warps, resident;  // threads and warps per block; blocks that run at the same time
  unsigned alive;
  Block* blocks;
  Thread* current;
  const unsigned* lanes;  // the order of a warp's lanes
  unsigned warp, place;   // the warp that runs, and the place in this order of the lane that runs
  bool advanced;          // a thread of this warp did more than spin
  SharedVariable variables[32];
  unsigned variable_count;
  size_t shared_top, static_bytes;
  Barrier grid_barrier;
  bool failed, restart;
  char message[1024];
};
inline Launch running;

inline unsigned number_from(const char* variable, unsigned otherwise) {
  const char* const text = std::getenv(variable);
  return text == nullptr ? otherwise : static_cast<unsigned>(std::atoi(text));
}
inline unsigned order = number_from("CUDAHOST_ORDER", 0);
inline unsigned max_resident = number_from("CUDAHOST_RESIDENT", 1);

// Stops the launch with a message; the host throws it as an Error.
[[noreturn]] CUDAHOST_HIDDEN void fail(const char* format, ...) {
  const int n =
      std::snprintf(running.message, sizeof running.message, "block (%u,%u,%u) thread (%u,%u,%u): ", blockIdx.x,
                    blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(running.message + n, sizeof running.message - static_cast<size_t>(n), format, arguments);
  va_end(arguments);
  running.failed = true;
  for (;;) go_home(*running.current);
}

// The next thread of the running warp that is ready, in the order of lanes; null if there is none.
CUDAHOST_HIDDEN Thread* next_thread(const Block& block) {
  for (int i = 0; i < 32; ++i) {
    running.place = (running.place + 1) % 32;
    const unsigned rank = running.warp * 32 + running.lanes[running.place];
    if (rank < running.threads && block.threads[rank].state == State::kReady) return &block.threads[rank];
  }
  return nullptr;
}

CUDAHOST_HIDDEN void make_current(Thread& thread) {
  running.current = &thread;
  threadIdx = thread.index;
}

// Lets the next thread of the warp run, or the scheduler if there is none. Returns when the thread is resumed.
CUDAHOST_HIDDEN void leave(Thread& thread, bool for_good = false) {
  running.advanced |= thread.state != State::kSpinning;
  Thread* const next = running.restart || running.failed ? nullptr : next_thread(*thread.block);
  if (next == nullptr) return go_home(thread, for_good);
  make_current(*next);
  if (next != &thread) hand_over(thread, *next, for_good);
}

CUDAHOST_HIDDEN void wait_as(State state, Place place) {
  Thread& thread = *running.current;
  thread.state = state;
  thread.place = place;
  leave(thread);
}

CUDAHOST_HIDDEN void* clock_of(const Block& block, unsigned clock) { return block.shared + kClocks + 8 * clock; }

// --- barriers

// Waits until all threads of `blocks` blocks have arrived. Returns the number of votes.
CUDAHOST_HIDDEN int wait_at(Barrier& barrier, Block* first, unsigned blocks, State state,
                            [[maybe_unused]] unsigned clock, bool vote, Place place) {
  const unsigned round = barrier.round & 1;
  if (barrier.arrived == 0) {
    barrier.place = place;
    barrier.votes[round] = 0;
  } else if (barrier.place.line != place.line || std::strcmp(barrier.place.file, place.file) != 0) {
    fail("divergent barrier: %s:%d while other threads wait at %s:%d", place.file, place.line, barrier.place.file,
         barrier.place.line);
  }
  barrier.votes[round] += vote;
  __tsan_release(clock_of(*first, clock + round));
  if (++barrier.arrived == blocks * running.threads) {
    barrier.arrived = 0;
    ++barrier.round;
    for (Block* block = first; block < first + blocks; ++block)
      for (unsigned i = 0; i < running.threads; ++i)
        if (block->threads[i].state == state) block->threads[i].state = State::kReady;
    if (blocks > 1) {  // restart the schedule: CUDAHOST_ORDER decides which block runs first, not the last arrival
      running.restart = true;
      wait_as(State::kReady, place);
    }
  } else {
    wait_as(state, place);
  }
  __tsan_acquire(clock_of(*first, clock + round));
  return static_cast<int>(barrier.votes[round]);
}

CUDAHOST_HIDDEN int wait_at_block(bool vote, Place place) {
  Block& block = *running.current->block;
  return wait_at(block.barrier, &block, 1, State::kAtBlock, kBlockClock, vote, place);
}

CUDAHOST_HIDDEN Block* first_of_cluster() {
  const unsigned cluster = running.config.cluster;
  return running.blocks + (running.current->block - running.blocks) / cluster * cluster;
}

// --- warps: each lane deposits eight bytes and waits for the other lanes of its mask

CUDAHOST_HIDDEN void complete(const Warp& warp, Exchange& exchange, Thread* first_lane) {
  if (exchange.arrived == 0 || (exchange.arrived | warp.exited) != (exchange.mask | warp.exited)) return;
  for (unsigned lane = 0; lane < 32; ++lane) {
    Thread& thread = first_lane[lane];
    if (exchange.arrived >> lane & 1 && thread.state == State::kAtWarp && thread.exchange == &exchange)
      thread.state = State::kReady;
  }
  exchange.took_part[exchange.round & 1] = exchange.arrived;
  exchange.arrived = 0;
  ++exchange.round;
}

struct Exchanged {
  const uint64_t* values;
  unsigned took_part;
};

// `syncs`: the collective is __syncwarp. Only it orders memory, and only its mask may contain lanes that have exited.
CUDAHOST_HIDDEN Exchanged exchange_in_warp(const char* kind, unsigned mask, uint64_t value, bool syncs, Place place) {
  Thread& thread = *running.current;
  Block& block = *thread.block;
  const unsigned index = thread.rank / 32, lane = thread.rank % 32;
  Warp& warp = block.warps[index];
  if ((mask >> lane & 1) == 0)
    fail("%s at %s:%d: mask %08x lacks the calling lane %u", kind, place.file, place.line, mask, lane);
  if (const unsigned gone = mask & warp.exited & ~warp.absent; gone != 0 && !syncs)
    fail("%s at %s:%d: mask %08x names exited lanes %08x", kind, place.file, place.line, mask, gone);
  unsigned i = 0;
  while (i < warp.masks && warp.exchanges[i].mask != mask) ++i;
  if (i == Warp::kMaxMasks) fail("more than %u distinct warp masks", Warp::kMaxMasks);
  Exchange& exchange = warp.exchanges[i];
  if (i == warp.masks) {
    ++warp.masks;
    exchange.mask = mask;
    exchange.arrived = exchange.round = 0;
  }
  if (exchange.arrived == 0)
    exchange.kind = kind;
  else if (exchange.kind != kind && std::strcmp(exchange.kind, kind) != 0)
    fail("%s at %s:%d while other lanes of mask %08x wait in %s", kind, place.file, place.line, mask, exchange.kind);

  const unsigned round = exchange.round, slot = round & 1;
  exchange.values[slot][lane] = value;
  exchange.arrived |= 1u << lane;
  thread.exchange = &exchange;
  [[maybe_unused]] void* const clock = clock_of(block, kWarpClocks + (index * 32 + i) * 2 + slot);
  if (syncs) __tsan_release(clock);
  complete(warp, exchange, block.threads + index * 32);
  if (exchange.round == round) wait_as(State::kAtWarp, place);
  if (syncs) __tsan_acquire(clock);
  return {exchange.values[slot], exchange.took_part[slot]};
}

// Returns the value of lane source(lane, first, last), where [first, last] is the lane's segment of `width` lanes.
template <class T, class Source>
CUDAHOST_HIDDEN T shuffle(const char* kind, unsigned mask, T value, int width, Place place, const Source& source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const Exchanged exchanged = exchange_in_warp(kind, mask, bits, false, place);
  const int lane = static_cast<int>(running.current->rank % 32), first = lane & ~(width - 1);
  const int from = source(lane, first, first + width - 1);
  if ((exchanged.took_part >> from & 1) == 0)
    fail("%s at %s:%d reads lane %d, which takes no part (mask %08x)", kind, place.file, place.line, from, mask);
  std::memcpy(&value, &exchanged.values[from], sizeof value);
  return value;
}

// --- shared memory: a variable has the same offset in every block

CUDAHOST_HIDDEN void* shared_at(const void* tag, size_t size, size_t alignment) {
  unsigned i = 0;
  while (i < running.variable_count && running.variables[i].tag != tag) ++i;
  if (i == running.variable_count) {
    if (i == 32) fail("more than 32 shared variables");
    running.variables[i] = {tag, (running.shared_top + kGap + alignment - 1) / alignment * alignment};
    running.shared_top = running.variables[i].offset + size;
    running.static_bytes += size;
    ++running.variable_count;
    if (running.static_bytes > kMaxStatic || running.static_bytes + running.config.shared_bytes > kMaxShared)
      fail("too much shared memory: %zu static + %zu dynamic", running.static_bytes, running.config.shared_bytes);
  }
  Block& block = *running.current->block;
  char* const variable = block.shared + running.variables[i].offset;
  if ((block.declared >> i & 1) == 0) {
    block.declared |= 1u << i;
    ASAN_UNPOISON_MEMORY_REGION(variable, size);
  }
  return variable;
}

// Each declaration passes a lambda of a different type, so that each instantiates a different tag.
template <class T, class Lambda>
CUDAHOST_HIDDEN T& shared(Lambda) {
  static const char tag = 0;
  return *static_cast<T*>(shared_at(&tag, sizeof(T), std::max<size_t>(alignof(T), 16)));
}

CUDAHOST_HIDDEN void* dynamic_shared() { return running.current->block->shared; }

// --- asynchronous copies: performed as late as a wait allows, or in descending order of threads at once. Until then
// the target is NaN.

CUDAHOST_UNORDERED void start_copy(void* target, const void* source, int bytes) {
  Thread& thread = *running.current;
  const std::ptrdiff_t offset = static_cast<char*>(target) - thread.block->shared;
  if (offset < 0 || offset + 16 > static_cast<std::ptrdiff_t>(running.config.shared_bytes) || offset % 16 != 0)
    fail("a copy to offset %td of %zu bytes of dynamic shared memory", offset, running.config.shared_bytes);
  if (bytes < 0 || bytes > 16 || reinterpret_cast<uintptr_t>(source) % 16 != 0)
    fail("a copy of %d bytes from %p", bytes, source);
  std::memset(target, 0xff, 16);
  const Copy copy{target, source, bytes, thread.copy_groups};
  if (order == 1) return copy.perform();
  const unsigned count = thread.copy_count++;
  if ((count & (count - 1)) == 0)  // the memory is full; it is freed when the thread exits
    thread.copies = static_cast<Copy*>(std::realloc(thread.copies, (count == 0 ? 1 : 2 * count) * sizeof(Copy)));
  thread.copies[count] = copy;
}

CUDAHOST_HIDDEN void end_copies() { ++running.current->copy_groups; }

CUDAHOST_HIDDEN void wait_for_copies(unsigned pending) {
  Thread& thread = *running.current;
  unsigned kept = 0;
  for (unsigned i = 0; i < thread.copy_count; ++i)
    if (thread.copies[i].group + pending < thread.copy_groups)
      thread.copies[i].perform();
    else
      thread.copies[kept++] = thread.copies[i];
  thread.copy_count = kept;
}

// --- atomics and fences: a fence before an atomic is a release, one after it an acquire

template <class T, class F>
CUDAHOST_UNORDERED T atomically(T* location, F f) {
  running.current->seen = running.current->block->seen = location;
  T before, after;
  __atomic_load(location, &before, __ATOMIC_RELAXED);
  do after = f(before);
  while (!__atomic_compare_exchange(location, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  if (running.current->fenced) __tsan_release(location);
  return before;
}

CUDAHOST_HIDDEN void fence() {
  Thread& thread = *running.current;
  thread.fenced = true;
  if (thread.seen != nullptr) __tsan_acquire(const_cast<void*>(thread.seen));
  if (thread.block->seen != nullptr) __tsan_acquire(const_cast<void*>(thread.block->seen));
}

// --- the order of launches

// ThreadSanitizer's clock of the end of all launches so far. The host acquires it before each launch, except before one
// that overlaps.
inline char ended;
inline std::vector<std::shared_ptr<void>> arguments_in_use;

// Makes the host wait for all launches.
CUDAHOST_HIDDEN void synchronize() {
  __tsan_acquire(&ended);
  arguments_in_use.clear();
}

CUDAHOST_HIDDEN void wait_for_previous_launch() {
  running.current->waited = true;
  __tsan_acquire(&ended);
}

}  // namespace cudahost
