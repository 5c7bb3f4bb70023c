#include "memory/system.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace normfused::memory {

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_HUGEPAGE)

namespace {

constexpr std::size_t kUnlimited = std::numeric_limits<std::size_t>::max();

// The number at the start of a file, or kUnlimited if there is none, as in "max".
std::size_t read_number(const std::string& path) {
  std::ifstream file(path);
  std::size_t number;
  return file >> number ? number : kUnlimited;
}

// The least of the numbers in files called `name` in a folder and those above it, up to `root`.
std::size_t least_number(const std::string& root, std::string folder, const char* name) {
  std::size_t least = read_number(root + "/" + name);
  for (; folder.size() > 1; folder.erase(std::min(folder.size(), folder.find_last_of('/'))))
    least = std::min(least, read_number(root + folder + "/" + name));
  return least;
}

// The memory that the control groups of this process allow. Lines of the file are "number:controllers:path".
std::size_t control_group_bytes() {
  std::size_t least = kUnlimited;
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string folder = line.substr(second + 1);
    if (controllers == ",,")  // version 2; the second folder is used if both versions are mounted
      least = std::min({least, least_number("/sys/fs/cgroup", folder, "memory.max"),
                        least_number("/sys/fs/cgroup/unified", folder, "memory.max")});
    else if (controllers.find(",memory,") != std::string::npos)
      least = std::min(least, least_number("/sys/fs/cgroup/memory", folder, "memory.limit_in_bytes"));
  }
  return least;
}

std::size_t physical_bytes() {
  const long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);
  return pages > 0 && page_bytes > 0 ? static_cast<std::size_t>(pages) * static_cast<std::size_t>(page_bytes) : 0;
}

bool is_limited(int resource) {
  rlimit limit;
  return getrlimit(static_cast<decltype(RLIMIT_AS)>(resource), &limit) != 0 || limit.rlim_cur != RLIM_INFINITY;
}

}  // namespace

ProcessMemory::ProcessMemory(std::size_t max_cached_bytes)
    : max_cached_bytes_(std::min(max_cached_bytes, std::min(physical_bytes(), control_group_bytes()) / 2)) {
  if (read_number("/proc/sys/vm/overcommit_memory") == 2) max_cached_bytes_ = 0;
}

bool ProcessMemory::is_supported() {
  const std::size_t page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* const page = mmap(nullptr, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return false;
  const bool supported = madvise(page, page_bytes, MADV_FREE) == 0;
  munmap(page, page_bytes);
  return supported;
}

void* ProcessMemory::map(std::size_t bytes) {
  // One page more, to have an aligned part. The rest is unmapped.
  char* const begin =
      static_cast<char*>(mmap(nullptr, bytes + kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (begin == MAP_FAILED) return nullptr;
  const std::size_t before = (kPageBytes - reinterpret_cast<uintptr_t>(begin) % kPageBytes) % kPageBytes;
  char* const data = begin + before;
  if (before > 0) munmap(begin, before);
  munmap(data + bytes, kPageBytes - before);
  (void)madvise(data, bytes, MADV_HUGEPAGE);  // advice: without it the pages are small
  return data;
}

void ProcessMemory::unmap(void* data, std::size_t bytes) { munmap(data, bytes); }

bool ProcessMemory::make_reclaimable(void* data, std::size_t bytes) { return madvise(data, bytes, MADV_FREE) == 0; }

std::size_t ProcessMemory::max_cached_bytes() {
  return is_limited(RLIMIT_AS) || is_limited(RLIMIT_DATA) ? 0 : max_cached_bytes_;
}

#else

ProcessMemory::ProcessMemory(std::size_t) : max_cached_bytes_(0) {}
bool ProcessMemory::is_supported() { return false; }
void* ProcessMemory::map(std::size_t) { return nullptr; }
void ProcessMemory::unmap(void*, std::size_t) {}
bool ProcessMemory::make_reclaimable(void*, std::size_t) { return false; }
std::size_t ProcessMemory::max_cached_bytes() { return max_cached_bytes_; }

#endif

int64_t ProcessMemory::seconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::seconds>(now).count();
}

}  // namespace normfused::memory
