// The memory of this process: huge pages where the system has them.
#pragma once

#include "memory/pool.h"

namespace normfused::memory {

class ProcessMemory final : public System {
 public:
  // `max_cached_bytes`: a bound next to those of the machine, see max_cached_bytes().
  explicit ProcessMemory(std::size_t max_cached_bytes);

  // Whether this system can take pages of free memory without unmapping them. Otherwise a pool would withhold memory.
  static bool is_supported();

  void* map(std::size_t bytes) override;
  void unmap(void* data, std::size_t bytes) override;
  bool make_reclaimable(void* data, std::size_t bytes) override;

  // Half of the memory of the machine or of the control group, whichever is less. Nothing while a resource limit bounds
  // the address space or the data of the process, or the system does not overcommit: free memory counts there.
  std::size_t max_cached_bytes() override;

  int64_t seconds() override;

 private:
  std::size_t max_cached_bytes_;
};

}  // namespace normfused::memory
