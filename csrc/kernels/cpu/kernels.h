// The CPU kernels as the rest of the library sees them; each picks its instruction set at run time.
#pragma once

#include "kernels/cpu/parallel.h"
#include "kernels/types.h"

namespace normfused::cpu {

// Normalizes with the batch's own statistics, writes them to mean and invstd, updates running buffers and counter.
// Needs at least two values per channel.
void batch_norm_training(const BatchNormForward& args, const Parallel& parallel);

// Normalizes with running_mean and running_var, or without them with mean and invstd.
void batch_norm_inference(const BatchNormForward& args, const Parallel& parallel);

// Writes those gradients that are asked for.
void batch_norm_backward(const BatchNormBackward& args, const Parallel& parallel);

// Per channel, in one read: mean, sum of squared deviations, least and greatest value.
void channel_moments(const ChannelStats& args, const Parallel& parallel);

// Per channel, in one read: sum, sum of squares, least and greatest value; in double, of integers exactly in int64.
void channel_sums(const ChannelStats& args, const Parallel& parallel);

// A rank's moments in one read, and the statistics of all ranks: equal to the bit on each.
void pack_moments(const PackMoments& args, const Parallel& parallel);
void merge_ranks(const MergeRanks& args, const Parallel& parallel);

void standardize(const Standardize& args, const Parallel& parallel);

// Forward, or backward where there is a grad_output.
void local_response_norm(const LocalResponseNorm& args, const Parallel& parallel);

// "avx512", "avx2" or "baseline": the widest that machine and library have, or the narrower one named by the
// environment variable NORMFUSED_CPU_CAPABILITY.
const char* capability();

}  // namespace normfused::cpu
