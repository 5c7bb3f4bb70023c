// The statistics of a batch from the moments of all ranks. Ranks can be machines of different kinds, and all must
// compute bitwise identical results. So this is compiled once, for the baseline, and without contraction of a * b + c
// to a fused multiply-add, which rounds once instead of twice: processors other than x86-64 have it in their baseline.
#include "kernels/cpu/target.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#define NF_ISA portable
#define NF_VECTOR_BYTES 16
#include "kernels/cpu/batch_norm.inl"

namespace normfused::cpu::portable {

namespace {

// Merges the messages of all ranks to the statistics of the batch and updates the running statistics.
template <class S>
void merge_ranks_of(const MergeRanks& args) {
  const Workspace workspace(2 * args.channels, 0);
  const ResultTable results{workspace.results, args.channels};
  for (int64_t c = 0; c < args.channels; ++c) {
    const Moments moments = merged<S>(args, c);
    results(0, c) = moments.mean;
    results(1, c) = moments.m2;
  }
  *args.count = 0;
  for (int64_t rank = 0; rank < args.ranks; ++rank) *args.count += args.words[rank * args.stride];
  if (*args.count == 0) {
    std::fill_n(args.mean, args.channels, 0.);
    std::fill_n(args.invstd, args.channels, 0.);
    return;
  }
  const double factor = next_update_factor(args);
  for_each_channel_chunk(0, args.channels,
                         [&](int64_t c0, int64_t n) { finish_statistics(args, *args.count, results, factor, c0, n); });
}

}  // namespace

void merge_ranks(const MergeRanks& args, const Parallel&) {
  args.is_double ? merge_ranks_of<double>(args) : merge_ranks_of<float>(args);
}

}  // namespace normfused::cpu::portable
