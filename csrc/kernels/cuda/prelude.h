// The only header through which kernels see their compiler. nvcc compiles them for a GPU. A plain C++ compiler with
// tests/host_cuda on its include path compiles them for the simulator, which runs every CUDA thread as a fiber on the
// CPU. Three rules make that possible: shared memory is declared with NF_SHARED or NF_DYNAMIC_SHARED, kernels are
// started with launch(), and kernel files include no CUDA header themselves.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define NF_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define NF_DYNAMIC_SHARED(T, name) extern __shared__ T name[]
#define NF_DEVICE __device__ __forceinline__
#define NF_COMPILER_FENCE() asm volatile("" ::: "memory")  // the compiler moves no memory access across it

#else

#include "cuda_host.h"

#endif

namespace normfused::cuda {

struct LaunchConfig {
  dim3 grid, block;
  cudaStream_t stream;
  // Programmatic dependent launch: the kernel may start before the previous launch of the stream has ended, if the
  // device supports it (see may_overlap()). It must call wait_for_previous_launch() before it accesses memory.
  bool overlaps = false;
  int64_t shared_bytes = 0;  // dynamic shared memory of a block
};

#if defined(__CUDACC__)
// Allows a kernel this much dynamic shared memory: without it, static and dynamic memory together are limited to 48
// KiB. The driver is asked once for each kernel and device, and again for more.
inline cudaError_t allow_shared(const void* kernel, int64_t bytes) {
  if (bytes == 0) return cudaSuccess;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int64_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& most = allowed[{kernel, device}];
  if (error != cudaSuccess || bytes <= most) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}
#endif

// Starts a kernel. Returns the error of the launch, not of the kernel.
template <class... P, class... A>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(P...), A&&... args) {
#if defined(__CUDACC__)
  const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), config.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t launch{};
  launch.gridDim = config.grid;
  launch.blockDim = config.block;
  launch.stream = config.stream;
  launch.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  launch.attrs = &overlap;
  launch.numAttrs = config.overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&launch, kernel, std::forward<A>(args)...);
#else
  cudahost::launch(
      {config.grid, config.block, static_cast<size_t>(config.shared_bytes), config.stream, false, 1, config.overlaps},
      kernel, std::forward<A>(args)...);
  return cudaSuccess;
#endif
}

// Blocks of `threads` threads that a multiprocessor of the current device holds at once. Returns `fallback` if the
// driver does not tell, and in the simulator.
template <class Kernel>
int resident_blocks(Kernel kernel, int threads, int fallback) {
#if defined(__CUDACC__)
  int blocks = 0;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0) == cudaSuccess && blocks > 0)
    return blocks;
  (void)cudaGetLastError();  // the launch itself reports the error
#else
  (void)kernel, (void)threads;
#endif
  return fallback;
}

// Whether launches of this kernel, and of all kernels compiled for the same architectures, may overlap on the current
// device. The wait instruction needs compute capability 9.0. A newer device can also run code compiled for an older
// one, which lacks the instruction, so the function checks the code and not the device. Stream capture supports overlap
// since CUDA 12.3.
template <class Kernel>
bool may_overlap(Kernel kernel) {
#if defined(__CUDACC__)
  cudaFuncAttributes code{};
  int runtime = 0, driver = 0;
  if (cudaFuncGetAttributes(&code, kernel) == cudaSuccess && cudaRuntimeGetVersion(&runtime) == cudaSuccess &&
      cudaDriverGetVersion(&driver) == cudaSuccess)
    return code.ptxVersion >= 90 && runtime >= 12030 && driver >= 12030;
  (void)cudaGetLastError();  // the launch itself reports the error
  return false;
#else
  (void)kernel;
  return true;
#endif
}

}  // namespace normfused::cuda
