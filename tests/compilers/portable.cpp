// Prints what must be the same on all machines, or describes this one: the bits of merged statistics, the instruction
// sets of the processor according to CPUID and to the compiler, and whether the memory pool is supported.
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels/cpu/cpuid.h"
#include "kernels/cpu/table.h"
#include "memory/system.h"

using namespace normfused;

namespace {

constexpr int64_t kRanks = 5, kChannels = 40;

uint64_t state = 7;

// In [0, 1), with 52 random bits (Knuth's MMIX generator).
double next() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 12) * 0x1p-52;
}

void print(const char* name, const std::vector<double>& values) {
  std::printf("%s", name);
  for (const double value : values) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    std::printf(" %016" PRIx64, bits);
  }
  std::printf("\n");
}

void print_merged_statistics() {
  const int64_t stride = rank_words(kChannels, DType::kFloat64);
  std::vector<int64_t> words(kRanks * stride);
  for (int64_t rank = 0; rank < kRanks; ++rank) {
    int64_t* const message = words.data() + rank * stride;
    message[0] = 3 + 1000 * rank;
    for (int64_t i = 1; i < stride; ++i) {  // the mean and the standard deviation of each channel
      const double value = next() + static_cast<double>(i % 2);
      std::memcpy(message + i, &value, sizeof(value));
    }
  }
  std::vector<double> mean(kChannels), invstd(kChannels), running_mean(kChannels), running_var(kChannels);
  for (double& value : running_mean) value = next();
  for (double& value : running_var) value = next();
  int64_t count;
  MergeRanks args{};
  args.running_mean = {running_mean.data(), DType::kFloat64};
  args.running_var = {running_var.data(), DType::kFloat64};
  args.momentum = 0.1;
  args.eps = 1e-5;
  args.mean = mean.data();
  args.invstd = invstd.data();
  args.ranks = kRanks;
  args.channels = kChannels;
  args.is_double = true;
  args.words = words.data();
  args.stride = stride;
  args.count = &count;
  cpu::portable::merge_ranks(args, {});
  print("mean", mean);
  print("invstd", invstd);
  print("running_mean", running_mean);
  print("running_var", running_var);
}

}  // namespace

int main() {
  print_merged_statistics();
  std::printf("pool %d\n", memory::ProcessMemory::is_supported());
#if defined(__x86_64__)
  const cpu::InstructionSets sets = cpu::query_instruction_sets();
  std::printf("cpuid %d %d\n", sets.avx2, sets.avx512);
#if !defined(_WIN32)
  std::printf("compiler %d %d\n", __builtin_cpu_supports("avx2") != 0, __builtin_cpu_supports("avx512bw") != 0);
#endif
#endif
}
