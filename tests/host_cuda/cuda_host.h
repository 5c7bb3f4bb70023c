// CUDA's built-ins for a plain C++ compiler; kernels/cuda/prelude.h includes it if there is no nvcc. Types and
// conversions come from CUDA's own headers; no driver or CUDA library is needed. Only the built-ins that kernels use
// are defined.
//
// Performance, occupancy and scheduling are not simulated. Results can differ from a GPU's in the last bit where nvcc
// contracts a product and a sum.
#pragma once

#include "scheduler.h"

// NVIDIA's headers define __shared__ as nothing, which would make a variable per thread.
#undef __shared__
#define __shared__ _Pragma("GCC error \"use NF_SHARED(T, name, [N])\"")
#undef __launch_bounds__
#define __launch_bounds__(...)

#define NF_SHARED(T, name, ...)          \
  using name##_shared_t = T __VA_ARGS__; \
  name##_shared_t& name = ::cudahost::shared<name##_shared_t>([] {})
#define NF_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::cudahost::dynamic_shared())
#define NF_DEVICE inline
#define NF_COMPILER_FENCE()

inline void __syncthreads(CUDAHOST_HERE) { cudahost::wait_at_block(false, place); }
inline int __syncthreads_or(int vote, CUDAHOST_HERE) { return cudahost::wait_at_block(vote != 0, place) != 0; }
inline void __syncwarp(unsigned mask = ~0u, CUDAHOST_HERE) {
  cudahost::exchange_in_warp("__syncwarp", mask, 0, true, place);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDAHOST_HERE) {
  return cudahost::shuffle("__shfl_xor", mask, value, width, place,
                           [&](int lane, int, int last) { return (lane ^ lanes) > last ? lane : lane ^ lanes; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CUDAHOST_HERE) {
  return cudahost::shuffle("__shfl_down", mask, value, width, place, [&](int lane, int, int last) {
    return lane + static_cast<int>(by) > last ? lane : lane + static_cast<int>(by);
  });
}

inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() { cudahost::wait_for_previous_launch(); }

inline void __threadfence() { cudahost::fence(); }
// Must be called in every loop that waits for another block: it lets other threads run.
inline void __nanosleep(unsigned, CUDAHOST_HERE) { cudahost::wait_as(cudahost::State::kSpinning, place); }

template <class T>
T atomicAdd(T* location, std::common_type_t<T> value) {
  return cudahost::atomically(location, [=](T before) { return static_cast<T>(before + value); });
}
template <class T>
T atomicSub(T* location, std::common_type_t<T> value) {
  return cudahost::atomically(location, [=](T before) { return static_cast<T>(before - value); });
}
inline unsigned load_relaxed(unsigned* source) { return atomicAdd(source, 0); }
template <class T>
T atomicOr(T* location, std::common_type_t<T> value) {
  return cudahost::atomically(location, [=](T before) { return static_cast<T>(before | value); });
}
template <class T>
T atomicExch(T* location, std::common_type_t<T> value) {
  return cudahost::atomically(location, [=](T) { return value; });
}

template <class T>
T __ldcs(const T* source) {
  return *source;
}
template <class T>
void __stcs(T* target, std::common_type_t<T> value) {
  *target = value;
}

template <class T>
void __stwb(T* target, std::common_type_t<T> value) {
  *target = value;
}

// CUDA's approximate intrinsics: correctly rounded if `approximation` is 0, or off by the maximum error of the CUDA
// programming guide, upwards (1) or downwards (-1).
namespace cudahost {
inline int approximation = 0;
inline float off_by(float value, float units) {
  const float next = std::nextafter(std::fabs(value), HUGE_VALF) - std::fabs(value);
  return value == 0 || !(std::fabs(value) < HUGE_VALF) ? value : value + approximation * units * next;
}
}  // namespace cudahost
inline float __expf(float x) { return cudahost::off_by(std::exp(x), 2 + std::floor(std::fabs(1.173f * x))); }
inline float __fdividef(float a, float b) {
  return std::fabs(b) > 0x1p126f ? (std::isinf(a) ? NAN : 0 * a) : cudahost::off_by(a / b, 2);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

namespace cooperative_groups {

struct grid_group {
  void sync(CUDAHOST_HERE) const {
    cudahost::Launch& launch = cudahost::running;
    if (!launch.config.cooperative)
      cudahost::fail("grid sync at %s:%d without a cooperative launch", place.file, place.line);
    cudahost::wait_at(launch.grid_barrier, launch.blocks, launch.resident, cudahost::State::kAtGrid,
                      cudahost::kGridClock, false, place);
  }
};

struct cluster_group {
  void sync(CUDAHOST_HERE) const {
    cudahost::Block* const first = cudahost::first_of_cluster();
    cudahost::wait_at(first->cluster_barrier, first, num_blocks(), cudahost::State::kAtCluster, cudahost::kClusterClock,
                      false, place);
  }
  unsigned block_rank() const { return blockIdx.x % num_blocks(); }
  unsigned num_blocks() const { return cudahost::running.config.cluster; }
  template <class T>
  T* map_shared_rank(T* variable, unsigned rank) const {
    const std::ptrdiff_t offset = reinterpret_cast<char*>(variable) - cudahost::running.current->block->shared;
    return reinterpret_cast<T*>(cudahost::first_of_cluster()[rank].shared + offset);
  }
};

inline grid_group this_grid() { return {}; }
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
