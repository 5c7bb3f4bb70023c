// Uninitialized tensors for outputs, and the memory pool for those on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include "memory/pool.h"

namespace normfused::ops {

// Uninitialized tensors. Those on the CPU of 1 MiB and more use memory of the pool.
at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options);

// With the strides of `like`, which is dense.
at::Tensor empty_output_like(const at::Tensor& like);

// All zero while there is no pool: before the first large output, on systems that do not support it, with
// NORMFUSED_POOL=0.
memory::PoolStats memory_stats();

// Whether large outputs use the pool: false on systems that do not support it, and with NORMFUSED_POOL=0.
bool has_memory_pool();

// Returns the free memory of the pool to the system.
void empty_cache();

}  // namespace normfused::ops
