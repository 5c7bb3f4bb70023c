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
};

template <class... P, class... A>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(P...), A&&... args) {
#if defined(__CUDACC__)
  cudaLaunchConfig_t launch{};
  launch.gridDim = config.grid;
  launch.blockDim = config.block;
  launch.stream = config.stream;
  return cudaLaunchKernelEx(&launch, kernel, std::forward<A>(args)...);
#else
  cudahost::launch({config.grid, config.block, 0, config.stream}, kernel, std::forward<A>(args)...);
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

}  // namespace normfused::cuda
