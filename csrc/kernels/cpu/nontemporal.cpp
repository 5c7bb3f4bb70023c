#include "kernels/cpu/nontemporal.h"

#include <unistd.h>

#include <algorithm>

namespace normfused::cpu {

int64_t nontemporal_threshold(int64_t part) {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  constexpr int64_t cache = 0;
#endif
  return std::max(kMinNonTemporalBytes, cache / part);
}

}  // namespace normfused::cpu
