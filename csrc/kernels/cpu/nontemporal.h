// Which outputs are written past the caches.
#pragma once

#include <cstdint>

namespace normfused::cpu {

// Output bytes from which streaming stores pay: they spare the read of what they overwrite, but leave nothing in cache,
// and take up to twice as long where what they overwrite is still in one.
inline constexpr int64_t kMinNonTemporalBytes = 4 << 20;

// An output often lies where one before it lay, which a large last-level cache still holds. Up to these parts of that
// it pays to leave the output there for its next reader. On Granite Rapids (480 MiB) inference took 1.5 times as long
// streamed at 13 MB and 0.75 times at 51 MB. A training step of a stack of batch norm and ReLU took 1.2 times as long
// at 6 MB with two layers, 1.0 times with eight and 0.97 times with 32, whose tensors no cache holds; at 13 MB 0.9 to
// 1.0 times with any number. Ice Lake (48 MiB) is left with what is above.
inline constexpr int64_t kInferenceCachePart = 12, kTrainingCachePart = 48;
int64_t nontemporal_threshold(int64_t part);

}  // namespace normfused::cpu
