// The only header through which kernels see their compiler. nvcc compiles them for a GPU. A plain C++ compiler with
// tests/host_cuda on its include path compiles them for the simulator, which runs every CUDA thread as a fiber on the
// CPU. Three rules make that possible: shared memory is declared with NF_SHARED or NF_DYNAMIC_SHARED, kernels are
// started with launch(), and kernel files include no CUDA header themselves.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define NF_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define NF_DYNAMIC_SHARED(T, name) extern __shared__ T name[]
#define NF_DEVICE __device__ __forceinline__
#define NF_COMPILER_FENCE() asm volatile("" ::: "memory")  // the compiler moves no memory access across it

// The value that another block may be writing, from memory that all blocks share.
NF_DEVICE unsigned load_relaxed(const unsigned* source) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(source) : "memory");
  return value;
}

#else

#include "cuda_host.h"

#endif

namespace normfused::cuda {

// An extent of a grid. One that exceeds the type stays too large, so that CUDA refuses the launch.
constexpr unsigned extent(int64_t blocks) {
  return blocks < INT64_C(0xffffffff) ? static_cast<unsigned>(blocks) : 0xffffffffu;
}

struct LaunchConfig {
  dim3 grid, block;
  cudaStream_t stream;
  // Programmatic dependent launch: the kernel may start before the previous launch of the stream has ended, if the
  // device supports it (see may_overlap()). It must call wait_for_previous_launch() before it accesses memory.
  bool overlaps = false;
  int64_t shared_bytes = 0;  // dynamic shared memory of a block
  int cluster = 1;           // blocks along x that run together
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

// Whether the device can hold a cluster of a launch. The driver is asked once for each kernel, device and size.
inline bool cluster_fits(const void* kernel, const LaunchConfig& config, const cudaLaunchConfig_t& launch) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int64_t>, int> clusters;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [known, is_new] = clusters.try_emplace({kernel, device, config.cluster, config.shared_bytes}, 0);
  if (is_new && cudaOccupancyMaxActiveClusters(&known->second, kernel, &launch) != cudaSuccess) {
    known->second = 0;
    (void)cudaGetLastError();
  }
  return known->second > 0;
}
#endif

// The error of a launch if the device cannot hold one of its clusters. Another plan must then be used.
inline constexpr cudaError_t kNoCluster = cudaErrorInvalidConfiguration;

// Starts a kernel. Returns the error of the launch, not of the kernel.
template <class... P, class... A>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(P...), A&&... args) {
#if defined(__CUDACC__)
  cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), config.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t launch{};
  launch.gridDim = config.grid;
  launch.blockDim = config.block;
  launch.stream = config.stream;
  launch.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  cudaLaunchAttribute attributes[2]{};
  launch.attrs = attributes;
  if (config.overlaps) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[launch.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (config.cluster > 1) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[launch.numAttrs++].val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
    if (!cluster_fits(reinterpret_cast<const void*>(kernel), config, launch)) return kNoCluster;
  }
  return cudaLaunchKernelEx(&launch, kernel, std::forward<A>(args)...);
#else
  if (static_cast<unsigned>(config.cluster) > cudahost::max_cluster) return kNoCluster;
  cudahost::launch({config.grid, config.block, static_cast<size_t>(config.shared_bytes), config.stream, false,
                    static_cast<unsigned>(config.cluster), config.overlaps},
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
// device and run in clusters. Both need instructions of compute capability 9.0. A newer device can also run code
// compiled for an older one, which lacks them, so the function checks the code and not the device. Stream capture
// supports overlap since CUDA 12.3.
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
