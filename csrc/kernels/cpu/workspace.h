// Scratch memory of one call.
#pragma once

#include <cstdint>

namespace normfused::cpu {

struct Workspace {
  Workspace(int64_t results_count, int64_t table_bytes);  // throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  double* results;
  void* table;  // aligned to a cache line, like `results`; readable for two of the widest vectors past its end
};

}  // namespace normfused::cpu
