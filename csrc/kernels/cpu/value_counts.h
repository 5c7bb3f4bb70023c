// How often each value occurs in a channel, after rounding to few digits: the histogram behind quantiles.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/parallel.h"
#include "kernels/types.h"

namespace normfused::cpu {

struct ValueCounts {
  ChannelView view;  // fewer than 2^32 positions
  DType dtype;       // not a 16-bit floating one
  const void* input;
};

struct ValueCount {
  double value;
  int64_t count;
};

// The rounded values of each channel in ascending order, without NaNs and infinities.
//
// Floating values are rounded to 11 significant bits, a relative error of at most 2^-11; the largest finite one is
// (2 - 2^-10) 2^1023. Integers in [-2^15, 2^16) are exact, larger ones are rounded like floating values. A value is
// rounded independently of all others, so the counts of several tensors add up to those of their union.
//
// Source: the histogram has buckets of constant relative width, as the sketch of Masson, Rim and Lee, "DDSketch: A Fast
// and Fully-Mergeable Quantile Sketch with Relative-Error Guarantees", 2019; the bucket is the value's upper bits.
std::vector<std::vector<ValueCount>> value_counts(const ValueCounts& args, const Parallel& parallel);

}  // namespace normfused::cpu
