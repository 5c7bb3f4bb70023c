// AddressSanitizer reports an access to poisoned memory. Without AddressSanitizer these functions do nothing.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define NORMFUSED_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define NORMFUSED_ASAN 1
#endif

#if defined(NORMFUSED_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace normfused::memory {

inline void poison([[maybe_unused]] const void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(NORMFUSED_ASAN)
  __asan_poison_memory_region(data, bytes);
#endif
}

inline void unpoison([[maybe_unused]] const void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(NORMFUSED_ASAN)
  __asan_unpoison_memory_region(data, bytes);
#endif
}

}  // namespace normfused::memory
