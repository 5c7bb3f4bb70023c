// The one header through which a kernel meets its compiler. nvcc takes it, and so does a plain C++ compiler that has
// tests/host_cuda on its path: there a kernel runs on the CPU, one fiber for each of its threads. What makes that
// possible are three rules: shared memory is declared by NF_SHARED, kernels are started by launch(), and a kernel file
// includes nothing of CUDA by itself.
#pragma once

#include <utility>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define NF_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define NF_DEVICE __device__ __forceinline__
#define NF_COMPILER_FENCE() asm volatile("" ::: "memory")  // no access to memory is moved across it

#else

#include "cuda_host.h"

#endif

namespace normfused::cuda {

struct LaunchConfig {
  dim3 grid, block;
  cudaStream_t stream;
  // The launch may start before the one before it in the stream has ended, where the device can (may_overlap()): its
  // kernel calls wait_for_previous_launch() before it touches memory.
  bool overlaps = false;
};

template <class... P, class... A>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(P...), A&&... args) {
#if defined(__CUDACC__)
  cudaLaunchConfig_t launch{};
  launch.gridDim = config.grid;
  launch.blockDim = config.block;
  launch.stream = config.stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  launch.attrs = &overlap;
  launch.numAttrs = config.overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&launch, kernel, std::forward<A>(args)...);
#else
  cudahost::launch({config.grid, config.block, 0, config.stream, false, 1, config.overlaps}, kernel,
                   std::forward<A>(args)...);
  return cudaSuccess;
#endif
}

// Blocks of so many threads that a multiprocessor of the current device holds at once; on the CPU it is for the caller
// to say.
template <class Kernel>
int resident_blocks(Kernel kernel, int threads, int otherwise) {
#if defined(__CUDACC__)
  int blocks = 0;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0) == cudaSuccess && blocks > 0)
    return blocks;
  (void)cudaGetLastError();  // the launch itself will tell
#else
  (void)kernel, (void)threads;
#endif
  return otherwise;
}

// Whether launches of this kernel, and of all that are compiled for the same architectures, may overlap on the current
// device. The instruction that waits exists since compute capability 9.0. A newer device can run code compiled for an
// older one, without it: so the code is asked, not the device. Stream capture records overlap since CUDA 12.3.
template <class Kernel>
bool may_overlap(Kernel kernel) {
#if defined(__CUDACC__)
  cudaFuncAttributes code{};
  int runtime = 0, driver = 0;
  if (cudaFuncGetAttributes(&code, kernel) == cudaSuccess && cudaRuntimeGetVersion(&runtime) == cudaSuccess &&
      cudaDriverGetVersion(&driver) == cudaSuccess)
    return code.ptxVersion >= 90 && runtime >= 12030 && driver >= 12030;
  (void)cudaGetLastError();  // the launch itself will tell
  return false;
#else
  (void)kernel;
  return true;
#endif
}

}  // namespace normfused::cuda
