#include "kernels/cpu/streaming.h"

#include <unistd.h>

#include <algorithm>

namespace normfused::cpu {

int64_t stream_bytes(int64_t part) {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  constexpr int64_t cache = 0;
#endif
  return std::max(kStreamBytes, cache / part);
}

}  // namespace normfused::cpu
