#include "ops/output_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <cerrno>
#include <cstdlib>
#include <limits>
#include <string>

#include "memory/system.h"

#if defined(__unix__)
#include <pthread.h>
#endif

namespace normfused::ops {

namespace {

// Below this size outputs stay in malloc's memory, which is usually warm, and a huge page would be mostly empty.
constexpr size_t kMinBytes = 1 << 20;

// Touches each huge page of new memory in parallel. Otherwise the kernels' threads would fault on the same pages.
void fault_in(const memory::Block& block) {
  const auto pages = static_cast<int64_t>(block.bytes / memory::kPageBytes);
  at::parallel_for(0, pages, 1, [&](int64_t begin, int64_t end) {
    for (int64_t page = begin; page < end; ++page)
      static_cast<volatile char*>(block.data)[static_cast<size_t>(page) * memory::kPageBytes] = 0;
  });
}

// The value of NORMFUSED_POOL_LIMIT: a number of bytes, or no limit.
size_t limit_of_environment() {
  const char* const text = std::getenv("NORMFUSED_POOL_LIMIT");
  if (text == nullptr || *text == '\0') return std::numeric_limits<size_t>::max();
  char* end;
  errno = 0;
  const unsigned long long bytes = std::strtoull(text, &end, 10);
  TORCH_CHECK_VALUE(*end == '\0' && *text >= '0' && *text <= '9' && errno == 0,
                    "NORMFUSED_POOL_LIMIT must be a number of bytes, got '", text, "'");
  return bytes;
}

// torch's interface to the pool. Tensors with its memory can be resized, shared and freed like any other.
class OutputAllocator final : public c10::Allocator {
 public:
  OutputAllocator() : system_(limit_of_environment()), pool_(system_) {}

  c10::DataPtr allocate(size_t bytes) override;
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  memory::Pool& pool() { return pool_; }

 private:
  memory::ProcessMemory system_;
  memory::Pool pool_;
};

bool is_enabled() {
  const char* const text = std::getenv("NORMFUSED_POOL");
  const std::string value = text == nullptr ? "" : text;
  TORCH_CHECK_VALUE(value.empty() || value == "0" || value == "1", "NORMFUSED_POOL must be 0 or 1, got '", value, "'");
  return value != "0" && memory::ProcessMemory::is_supported();
}

OutputAllocator* make_allocator() {
  if (!is_enabled()) return nullptr;
  static OutputAllocator* const made = new OutputAllocator;  // never deleted: tensors may outlive static objects
#if defined(__unix__)
  pthread_atfork([] { made->pool().lock(); }, [] { made->pool().unlock(); }, [] { made->pool().unlock(); });
#endif
  return made;
}

// Null if there is no pool.
OutputAllocator* allocator() {
  static OutputAllocator* const made = make_allocator();
  return made;
}

void release(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  allocator()->pool().release(data);
}

c10::DataPtr OutputAllocator::allocate(size_t bytes) {
  const memory::Block block = bytes < kMinBytes ? memory::Block{} : pool_.allocate(bytes);
  if (block.data == nullptr) return c10::GetCPUAllocator()->allocate(bytes);  // which raises if it has no memory either
  c10::profiledCPUMemoryReporter().New(block.data, bytes);
  c10::DataPtr memory(block.data, block.data, release, c10::Device(c10::kCPU));
  if (block.is_new) fault_in(block);
  return memory;
}

constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);

c10::Allocator* allocator_for(size_t bytes) {
  return bytes >= kMinBytes && allocator() != nullptr ? allocator() : c10::GetCPUAllocator();
}

}  // namespace

// On the CPU these do without at::empty's way through the dispatcher: a small call makes up to eight tensors.

at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::empty(sizes, options);
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  return at::detail::empty_generic(sizes, allocator_for(bytes), kCpu, c10::typeMetaToScalarType(options.dtype()),
                                   options.memory_format_opt());
}

at::Tensor empty_output_like(const at::Tensor& like) {
  if (!like.device().is_cpu()) return at::empty_like(like);
  return at::detail::empty_strided_generic(like.sizes(), like.strides(), allocator_for(like.nbytes()), kCpu,
                                           like.scalar_type());
}

memory::PoolStats memory_stats() { return allocator() ? allocator()->pool().stats() : memory::PoolStats{}; }

bool has_memory_pool() { return allocator() != nullptr; }

void empty_cache() {
  if (allocator()) allocator()->pool().empty_cache();
}

}  // namespace normfused::ops
