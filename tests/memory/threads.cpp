// The memory pool on this machine's memory: threads that allocate, hand over and free blocks, and a fork among them.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "memory/pool.h"
#include "memory/system.h"

using normfused::memory::Block;
using normfused::memory::Pool;
using normfused::memory::ProcessMemory;

namespace {

std::atomic<int> errors{0};

struct Owned {
  Block block;
  uint64_t mark;
};

uint64_t& word(const Block& block, std::size_t at) { return static_cast<uint64_t*>(block.data)[at]; }

void write_marks(const Owned& owned) {
  const std::size_t words = owned.block.bytes / sizeof(uint64_t);
  for (std::size_t at = 0; at < words; at += 997) word(owned.block, at) = owned.mark + at;
}

void check_marks(const Owned& owned) {
  const std::size_t words = owned.block.bytes / sizeof(uint64_t);
  for (std::size_t at = 0; at < words; at += 997)
    if (word(owned.block, at) != owned.mark + at) ++errors;
}

// Blocks that one thread allocates and another one frees.
class Exchange {
 public:
  Owned swap(Owned owned, unsigned random) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (blocks_.size() < 16) {
      blocks_.push_back(owned);
      return {};
    }
    std::swap(blocks_[random % blocks_.size()], owned);
    return owned;
  }
  std::vector<Owned>& rest() { return blocks_; }

 private:
  std::mutex mutex_;
  std::vector<Owned> blocks_;
};

void work(Pool& pool, Exchange& exchange, unsigned seed, int rounds) {
  std::mt19937 random(seed);
  for (int round = 0; round < rounds; ++round) {
    Owned owned{pool.allocate(1 + random() % (8 << 20)), random()};
    if (owned.block.data == nullptr) {
      ++errors;
      continue;
    }
    write_marks(owned);
    owned = exchange.swap(owned, random());
    if (owned.block.data != nullptr) {
      check_marks(owned);
      pool.release(owned.block.data);
    }
    if (random() % 500 == 0) pool.empty_cache();
  }
}

// A child of a process with threads may use the pool: the parent holds its lock while it forks.
void use_in_child(Pool& pool) {
  pool.lock();
  const pid_t child = fork();
  pool.unlock();
  if (child == 0) {
    for (int i = 0; i < 20; ++i) {
      const Owned owned{pool.allocate(3 << 20), static_cast<uint64_t>(i)};
      write_marks(owned);
      check_marks(owned);
      pool.release(owned.block.data);
    }
    _exit(errors == 0 ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  if (status != 0) ++errors;
}

int use_after_release() {
  ProcessMemory memory(std::size_t{1} << 30);
  Pool pool(memory);
  const Block block = pool.allocate(4 << 20);
  pool.release(block.data);
  return static_cast<int>(word(block, 12345));
}

}  // namespace

int main(int count, char** arguments) {
  const bool fork_too = count > 1 && std::strcmp(arguments[1], "fork") == 0;
  if (count > 1 && std::strcmp(arguments[1], "use-after-release") == 0) return use_after_release();
  if (!ProcessMemory::is_supported()) {
    std::printf("not supported\n");
    return 0;
  }
  ProcessMemory memory(std::size_t{1} << 30);
  Pool pool(memory);
  Exchange exchange;
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 8; ++seed) threads.emplace_back([&, seed] { work(pool, exchange, seed, 400); });
  for (int i = 0; fork_too && i < 10; ++i) use_in_child(pool);
  for (std::thread& thread : threads) thread.join();
  for (const Owned& owned : exchange.rest()) {
    check_marks(owned);
    pool.release(owned.block.data);
  }
  const auto stats = pool.stats();
  std::printf("%llu allocations, %llu reuses, %zu bytes in use, %d errors\n",
              static_cast<unsigned long long>(stats.allocations), static_cast<unsigned long long>(stats.reuses),
              stats.allocated_bytes, errors.load());
  return errors == 0 && stats.allocated_bytes == 0 && stats.reuses > stats.allocations / 2 ? 0 : 1;
}
