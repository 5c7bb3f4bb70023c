// Ranges of tickets: one per key, disjoint, initially zero, and reused until they grow.
#include "kernels/cuda/tickets.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>
#include <thread>
#include <vector>

using namespace normfused;
using cuda::TicketKey;

namespace {

struct Memory {
  std::vector<std::unique_ptr<unsigned[]>> blocks;
  int64_t total = 0;

  unsigned* zeros(int, int64_t count) {
    blocks.emplace_back(new unsigned[static_cast<size_t>(count)]());
    total += count;
    return blocks.back().get();
  }
};

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED %s\n", what);
  std::exit(1);
}

// Marks a range, as its launch would while it runs. A mark that is already present means that two keys share a ticket.
void mark(unsigned* first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) expect(first[i]++ == 0, "a ticket belongs to two keys, or is not zero");
}

void keys_have_separate_ranges() {
  Memory memory;
  cuda::Tickets tickets([&](int device, int64_t count) { return memory.zeros(device, count); });
  const TicketKey keys[] = {{0, 1, 0, 0},  {0, 2, 0, 0}, {0, 1, 0, 9}, {0, 2, 0, 9},
                            {0, 1, 0, 10}, {0, 3, 1, 0}, {0, 3, 2, 0}, {1, 1, 0, 0}};
  for (const TicketKey& key : keys) mark(tickets.of(key, 100), 100);
  expect(memory.blocks.size() == 2, "one block of memory per device");
  for (const TicketKey& key : keys) expect(tickets.of(key, 100)[0] == 1, "a key keeps its range");
  for (const TicketKey& key : keys) expect(tickets.of(key, 7) == tickets.of(key, 100), "a smaller launch shares it");
}

void a_range_grows_into_fresh_memory() {
  Memory memory;
  cuda::Tickets tickets([&](int device, int64_t count) { return memory.zeros(device, count); });
  const TicketKey a{0, 1, 0, 0}, b{0, 2, 0, 0};
  for (int64_t count : {1, 64, 65, 1000, 70000, 200000})
    for (const TicketKey& key : {a, b}) {
      unsigned* const first = tickets.of(key, count);
      if (first[0] == 0) mark(first, count);  // otherwise the range was large enough
    }
  expect(memory.total < 2 * 2 * 3 * 200000, "a growing range allocates at most twice as much in total");
}

void threads_agree() {
  Memory memory;
  cuda::Tickets tickets([&](int device, int64_t count) { return memory.zeros(device, count); });
  std::vector<std::set<unsigned*>> seen(8);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < seen.size(); ++t)
    threads.emplace_back([&, t] {
      for (uint64_t stream = 0; stream < 500; ++stream) seen[t].insert(tickets.of({0, stream, 0, 0}, 100));
    });
  for (std::thread& thread : threads) thread.join();
  expect(seen[0].size() == 500, "500 streams have 500 ranges");
  for (const auto& ranges : seen) expect(ranges == seen[0], "all threads get the same");
}

}  // namespace

int main() {
  keys_have_separate_ranges();
  a_range_grows_into_fresh_memory();
  threads_agree();
}
