// Runs the threads of a launch in the simulator: launch().
#pragma once

#include "simulator.h"

namespace cudahost {

CUDAHOST_HIDDEN void run_thread() {
  arrive();
  running.call(running.arguments);
  Thread& thread = *running.current;
  Block& block = *thread.block;
  const unsigned index = thread.rank / 32, lane = thread.rank % 32;
  Warp& warp = block.warps[index];
  if (running.config.overlaps && !thread.waited) fail("exits without having waited for the previous launch");
  if (thread.copy_count > 0) fail("exits without having waited for %u copies", thread.copy_count);
  std::free(thread.copies);
  thread.state = State::kExited;
  --running.alive;
  warp.exited |= 1u << lane;
  for (unsigned i = 0; i < warp.masks; ++i) {
    Exchange& exchange = warp.exchanges[i];
    if (exchange.arrived != 0 && exchange.mask >> lane & 1 && std::strcmp(exchange.kind, "__syncwarp") != 0)
      fail("exits while lanes %08x wait in %s with mask %08x", exchange.arrived, exchange.kind, exchange.mask);
    complete(warp, exchange, block.threads + index * 32);
  }
  if (--block.live == 0)
    ASAN_POISON_MEMORY_REGION(block.shared, kArenaBytes);  // a later read by another block of the cluster is an error
  leave(thread, true);
}

CUDAHOST_HIDDEN uint64_t next_random(uint64_t& seed) {
  seed = seed * 6364136223846793005ull + 1442695040888963407ull;
  return seed >> 33;
}

CUDAHOST_HIDDEN std::vector<unsigned> in_order(size_t count, uint64_t& seed) {
  std::vector<unsigned> indices(count);
  std::iota(indices.begin(), indices.end(), 0u);
  if (order == 1) std::reverse(indices.begin(), indices.end());
  if (order > 1)
    for (size_t i = count; i > 1; --i) std::swap(indices[i - 1], indices[next_random(seed) % i]);
  return indices;
}

// Reports for the first blocks how many threads wait where.
CUDAHOST_HIDDEN void report_deadlock() {
  constexpr int kMaxParts = 6;
  std::string text = "deadlock:";
  int parts = 0;
  for (unsigned b = 0; b < running.resident && parts < kMaxParts; ++b) {
    const Block& block = running.blocks[b];
    for (int state = 0; state <= static_cast<int>(State::kExited); ++state) {
      const Thread* first = nullptr;
      unsigned count = 0;
      for (unsigned i = 0; i < running.threads; ++i)
        if (block.threads[i].state == static_cast<State>(state)) {
          if (count++ == 0) first = &block.threads[i];
        }
      if (count == 0) continue;
      ++parts;
      text += " block (" + std::to_string(block.index.x) + "," + std::to_string(block.index.y) + "," +
              std::to_string(block.index.z) + "): " + std::to_string(count) + " of " + std::to_string(running.threads) +
              " threads " + kStateNames[state];
      if (first->state != State::kExited && first->place.file != nullptr)
        text += std::string(" [") + first->place.file + ":" + std::to_string(first->place.line) + "]";
      text += ";";
    }
  }
  std::snprintf(running.message, sizeof running.message, "%s", text.c_str());
  running.failed = true;
}

// Runs the threads of a warp until all of them wait. Returns whether any did more than spin.
CUDAHOST_HIDDEN bool run_warp(Block& block, unsigned warp) {
  running.warp = warp;
  running.place = 31;  // the next is the first
  running.advanced = false;
  Thread* const first = next_thread(block);
  if (first == nullptr) return false;
  make_current(*first);
  blockIdx = block.index;
  resume(*first);
  return running.advanced;
}

// Runs the resident blocks until all threads have exited.
CUDAHOST_HIDDEN void run_resident(const std::vector<unsigned>& blocks, const std::vector<unsigned>& warps) {
  constexpr unsigned kMaxIdleRounds = 100000;  // in which threads only spin
  unsigned idle = 0;
  while (running.alive > 0) {
    bool advanced = false, spinning = false;
    running.restart = false;
    for (const unsigned b : blocks)
      for (const unsigned w : warps)
        if (!running.restart && !running.failed) advanced |= run_warp(running.blocks[b], w);
    for (Block* block = running.blocks; block < running.blocks + running.resident; ++block)
      for (unsigned i = 0; i < running.threads; ++i)
        if (block->threads[i].state == State::kSpinning) {
          block->threads[i].state = State::kReady;
          spinning = true;
        }
    idle = advanced ? 0 : idle + 1;
    if (running.failed) return;
    if (running.alive > 0 && ((!advanced && !spinning) || idle > kMaxIdleRounds)) return report_deadlock();
  }
}

// Stacks and shared memory of the resident blocks. They are reused by later launches, unless a launch fails: its frames
// stay poisoned. With ThreadSanitizer they are new for every wave of blocks, because reused memory would look like a
// race.
class Memory {
 public:
  CUDAHOST_HIDDEN Memory(size_t threads, size_t blocks) {
#if defined(__SANITIZE_THREAD__)
    release();
#endif
    if (kept_threads < threads || kept_blocks < blocks) {
      release();
      stacks = map_stacks(kept_threads = threads);
      arenas = map_memory((kept_blocks = blocks) * kArenaBytes);
    }
  }
  char* stack(size_t i) const { return stacks + i * kStackBytes; }
  char* arena(size_t i) const { return arenas + i * kArenaBytes; }
  // The bytes of a block's arena to initialize: all, or what earlier blocks of the launch can have written to it.
  CUDAHOST_HIDDEN static size_t used([[maybe_unused]] const Block& block) {
#if !defined(__SANITIZE_THREAD__)
    if (block.shared != nullptr) return running.shared_top;
#endif
    return kArenaBytes;
  }
  CUDAHOST_HIDDEN static void release() {
    unmap(stacks, kept_threads * kStackBytes);
    unmap(arenas, kept_blocks * kArenaBytes);
    kept_threads = kept_blocks = 0;
  }

 private:
  CUDAHOST_HIDDEN static void unmap(char* memory, size_t bytes) {
    if (bytes == 0) return;
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes);  // for the next mapping at this address
    munmap(memory, bytes);
  }

  static inline char *stacks = nullptr, *arenas = nullptr;
  static inline size_t kept_threads = 0, kept_blocks = 0;
};

CUDAHOST_HIDDEN void prepare(Thread& thread, Block& block, unsigned rank, char* stack) {
  const dim3& extent = running.config.block;
  thread = Thread{};
  thread.block = &block;
  thread.rank = rank;
  thread.index = {rank % extent.x, rank / extent.x % extent.y, rank / extent.x / extent.y};
  thread.stack = stack;
  thread.position = first_position(stack, run_thread);
#if defined(__SANITIZE_THREAD__)
  char name[64];
  std::snprintf(name, sizeof name, "block(%u,%u,%u) thread(%u,%u,%u)", block.index.x, block.index.y, block.index.z,
                thread.index.x, thread.index.y, thread.index.z);
  thread.tsan = __tsan_create_fiber(0);
  __tsan_set_fiber_name(thread.tsan, name);
#endif
}

CUDAHOST_HIDDEN void prepare(Block& block, uint64_t id, char* arena, size_t used) {
  const dim3& extent = running.config.grid;
  block.index = {static_cast<unsigned>(id % extent.x), static_cast<unsigned>(id / extent.x % extent.y),
                 static_cast<unsigned>(id / extent.x / extent.y)};
  block.shared = arena;
  block.declared = 0;
  block.live = running.threads;
  block.seen = nullptr;
  block.barrier = block.cluster_barrier = {};
  ASAN_UNPOISON_MEMORY_REGION(arena, used);
  std::memset(arena, 0xff, used);
  ASAN_POISON_MEMORY_REGION(arena, used);  // the rest is poisoned since the block before has exited
  ASAN_UNPOISON_MEMORY_REGION(arena, running.config.shared_bytes);
  for (unsigned w = 0; w < running.warps; ++w) {
    Warp& warp = block.warps[w];
    warp.masks = 0;
    warp.absent = (w + 1) * 32 <= running.threads ? 0u : ~0u << (running.threads - w * 32);
    warp.exited = warp.absent;
  }
}

// Throws an Error for a launch configuration that CUDA rejects, or that a sanitizer cannot check.
CUDAHOST_HIDDEN void check(const Config& config, uint64_t blocks, uint64_t threads) {
  const dim3& grid = config.grid;
  if (blocks == 0 || threads == 0 || threads > 1024 || config.block.z > 64 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535)
    throw Error("invalid launch configuration");
  if (config.shared_bytes > kMaxShared) throw Error("too much dynamic shared memory");
  if (config.cluster == 0 || config.cluster > 8 || grid.x % config.cluster != 0)
    throw Error("grid.x is not a multiple of the cluster size (1..8)");
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer has 255 slots for threads. Further threads would share a slot, and races between threads of one
  // slot would not be detected.
  if (blocks * threads > 250) throw Error("too many threads for a -fsanitize=thread build (250 per launch)");
#endif
}

// Destroys ThreadSanitizer's fibers, and orders the end of the launch after them. It is done at the very end, so that
// blocks stay unordered and no fiber reuses the slot of another.
CUDAHOST_HIDDEN void join([[maybe_unused]] const std::vector<void*>& fibers) {
#if defined(__SANITIZE_THREAD__)
  for (void* const fiber : fibers) {
    __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
    __tsan_release(&ended);
    __tsan_switch_to_fiber(home.tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(fiber);
  }
#endif
}

// How many blocks run at the same time: all of a cooperative launch, otherwise one cluster or several.
CUDAHOST_HIDDEN unsigned resident_blocks(const Config& config, uint64_t blocks, uint64_t& seed) {
  if (config.cooperative) return static_cast<unsigned>(blocks);
  uint64_t clusters = std::min<uint64_t>(max_resident, blocks / config.cluster);
  if (order > 1) clusters = 1 + next_random(seed) % clusters;
  concurrent += clusters > 1;
  return static_cast<unsigned>(clusters) * config.cluster;
}

// Runs the blocks of a launch in waves of resident blocks.
CUDAHOST_HIDDEN void run(const Config& config, void (*call)(void*), void* arguments) {
  const dim3 &grid = config.grid, &block = config.block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{block.x} * block.y * block.z;
  check(config, blocks, threads);
#if defined(__SANITIZE_THREAD__)
  home.tsan = __tsan_get_current_fiber();
#endif

  ++launches;
  running = Launch{};
  running.config = config;
  running.call = call;
  running.arguments = arguments;
  running.threads = static_cast<unsigned>(threads);
  running.warps = (running.threads + 31) / 32;
  uint64_t seed = order;
  const unsigned wave_blocks = resident_blocks(config, blocks, seed);
  running.shared_top = (config.shared_bytes + 15) / 16 * 16;
  gridDim = grid;
  blockDim = block;
  std::vector<Block> resident(wave_blocks);
  std::vector<Thread> all_threads(wave_blocks * threads);
  std::vector<Warp> all_warps(wave_blocks * running.warps);
  std::vector<void*> fibers;
  running.blocks = resident.data();
  const auto waves = in_order((blocks + wave_blocks - 1) / wave_blocks, seed),
             warp_order = in_order(running.warps, seed), lane_order = in_order(32, seed);
  running.lanes = lane_order.data();

  for (size_t wave = 0; wave < waves.size() && !running.failed; ++wave) {
    const Memory memory(all_threads.size(), resident.size());
    const uint64_t first = uint64_t{waves[wave]} * wave_blocks;
    running.resident = static_cast<unsigned>(std::min<uint64_t>(wave_blocks, blocks - first));
    running.alive = running.resident * running.threads;
    for (unsigned b = 0; b < running.resident; ++b) {
      resident[b].threads = &all_threads[b * threads];
      resident[b].warps = &all_warps[b * running.warps];
      prepare(resident[b], first + b, memory.arena(b), Memory::used(resident[b]));
      for (unsigned i = 0; i < running.threads; ++i)
        prepare(resident[b].threads[i], resident[b], i, memory.stack(b * threads + i));
    }
#if defined(__SANITIZE_THREAD__)
    for (unsigned i = 0; i < running.alive; ++i) fibers.push_back(all_threads[i].tsan);
#endif
    run_resident(in_order(running.resident, seed), warp_order);
  }
  join(fibers);
  if (running.failed) {
    Memory::release();
    throw Error(running.message);
  }
}

// Starts a kernel: runs it to its end and throws an Error if it failed. Its arguments stay alive until the host
// synchronizes, because for ThreadSanitizer an overlapping launch may still read them.
template <class... P, class... A>
void launch(const Config& config, void (*kernel)(P...), A&&... args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  };
  if (!config.overlaps) synchronize();
  const std::shared_ptr<Call> call(new Call{kernel, std::tuple<P...>(std::forward<A>(args)...)});
  arguments_in_use.push_back(call);
  run(config, [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->args); }, call.get());
}

}  // namespace cudahost
