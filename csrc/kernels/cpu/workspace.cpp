#include "kernels/cpu/workspace.h"

#include <cstddef>
#include <new>

namespace normfused::cpu {

namespace {
constexpr std::align_val_t kCacheLine{64};
constexpr int64_t kPastTheEnd = 128;
}  // namespace

Workspace::Workspace(int64_t results_count, int64_t table_bytes) {
  // Rounded up to a cache line: the table follows the results and has the same alignment.
  const int64_t results_bytes = (results_count * static_cast<int64_t>(sizeof(double)) + 63) / 64 * 64;
  results = static_cast<double*>(
      ::operator new(static_cast<std::size_t>(results_bytes + table_bytes + kPastTheEnd), kCacheLine));
  table = reinterpret_cast<char*>(results) + results_bytes;
}

Workspace::~Workspace() { ::operator delete(results, kCacheLine); }

}  // namespace normfused::cpu
