// Which outputs are written with non-temporal stores, that is, past the caches.
#pragma once

#include <cstdint>

namespace normfused::cpu {

// Minimum output size for non-temporal stores. They save the read of the cache lines that they overwrite, but leave
// nothing in cache, and take up to twice as long if those lines are in cache.
inline constexpr int64_t kMinNonTemporalBytes = 4 << 20;

// An allocator often reuses the memory of an earlier output, which a large last-level cache still holds. Outputs of up
// to 1/24 (inference) or 1/48 (training) of that cache are therefore left in it for their next reader. That is far less
// than the cache: a virtual machine reports all of it, and shares it with others.
//
// Granite Rapids, 480 MiB, time with non-temporal stores relative to plain ones:
//   inference: 1.5 at 13 MB, 0.75 at 51 MB
//   training step of a stack of batch norm and ReLU layers: at 6 MB 1.2 with two layers, 1.0 with eight, 0.97 with 32
//   (no cache holds their tensors); at 13 MB 0.9 to 1.0 with any number of layers
// A shared cache of 260 MiB, inference at 13 MB: 0.5 to 0.9 alone, 0.9 to 1.1 between convolutions, 1.0 to 1.2 between
// ReLU layers, 1.5 in a stack of fused layers that read nothing else.
// On Ice Lake (48 MiB) kMinNonTemporalBytes decides.
inline constexpr int64_t kInferenceCachePart = 24, kTrainingCachePart = 48;

// Output size in bytes from which non-temporal stores are used: 1/part of the last-level cache, at least
// kMinNonTemporalBytes.
int64_t nontemporal_threshold(int64_t part);

}  // namespace normfused::cpu
