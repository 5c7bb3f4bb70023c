// Scratch memory of one kernel call.
#pragma once

#include <cstdint>

namespace normfused::cpu {

struct Workspace {
  // `results_count` doubles and `table_bytes` bytes. Throws std::bad_alloc.
  Workspace(int64_t results_count, int64_t table_bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  double* results;  // aligned to a cache line
  void* table;      // aligned to a cache line; reads of up to two 64-byte vectors past its end are valid
};

}  // namespace normfused::cpu
