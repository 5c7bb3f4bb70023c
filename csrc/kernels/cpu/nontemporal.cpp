#include "kernels/cpu/nontemporal.h"

#include <algorithm>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

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
