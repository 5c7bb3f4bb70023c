// CUDA's built-ins for a plain C++ compiler: what kernels/cuda/prelude.h includes where there is no nvcc. It takes
// types and conversions from CUDA's own headers; no driver and no CUDA library is needed.
//
// Not to be had: performance, occupancy, scheduling. Results can differ in the last bit where nvcc contracts a product
// and a sum.
#pragma once

#include "simulator.h"

#undef __shared__
#define __shared__ _Pragma("GCC error \"use NF_SHARED(T, name, [N])\"")
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __cluster_dims__
#define __cluster_dims__(...)
#define NF_SHARED(T, name, ...)      \
  using name##_ch_t = T __VA_ARGS__; \
  name##_ch_t& name = ::cudahost::shared<name##_ch_t>([] {})
#define NF_DYN_SHARED(T, name) T* name = static_cast<T*>(::cudahost::dyn_shared())

#define NF_DEVICE inline

// --- device built-ins
// ----------------------------------------------------------------------------------------------------
inline void __syncthreads(CUDAHOST_SITE) { cudahost::block_barrier(0, file, line); }
inline int __syncthreads_count(int v, CUDAHOST_SITE) { return cudahost::block_barrier(v, file, line); }
inline int __syncthreads_or(int v, CUDAHOST_SITE) { return cudahost::block_barrier(v, file, line) != 0; }
inline int __syncthreads_and(int v, CUDAHOST_SITE) { return cudahost::block_barrier(!v, file, line) == 0; }
inline void __syncwarp(unsigned mask = ~0u, CUDAHOST_SITE) {
  cudahost::warp_exchange("__syncwarp", mask, 0, true, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int w = 32, CUDAHOST_SITE) {
  return cudahost::shfl("__shfl_xor", m, v, x, w, file, line);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32, CUDAHOST_SITE) {
  return cudahost::shfl("__shfl_down", m, v, int(d), w, file, line);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32, CUDAHOST_SITE) {
  return cudahost::shfl("__shfl_up", m, v, int(d), w, file, line);
}
template <class T>
T __shfl_sync(unsigned m, T v, int s, int w = 32, CUDAHOST_SITE) {
  return cudahost::shfl("__shfl_idx", m, v, s, w, file, line);
}
inline unsigned __ballot_sync(unsigned m, int p, CUDAHOST_SITE) { return cudahost::ballot(m, p, file, line); }
inline int __any_sync(unsigned m, int p, CUDAHOST_SITE) { return cudahost::ballot(m, p, file, line) != 0; }
inline int __all_sync(unsigned m, int p, CUDAHOST_SITE) { return cudahost::ballot(m, !p, file, line) == 0; }
CUDAHOST_FN void __threadfence() {  // orders before later atomics, and after the last atomic of this thread or block
  auto& t = *cudahost::g.cur;
  t.fenced = true;
  if (t.seen) __tsan_acquire(t.seen);
  if (t.blk->seen) __tsan_acquire(t.blk->seen);
}
CUDAHOST_FN void __threadfence_block() { __threadfence(); }
CUDAHOST_FN void __threadfence_system() { __threadfence(); }
inline void __nanosleep(unsigned, CUDAHOST_SITE) {
  cudahost::block_on(cudahost::YIELD, file, line);
}  // spin loops must call this
template <class T>
T atomicAdd(T* p, std::common_type_t<T> v) {
  return cudahost::atomic_rmw(p, [=](T o) { return T(o + v); });
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> v) {
  return cudahost::atomic_rmw(p, [=](T o) { return o < v ? v : o; });
}
template <class T>
T atomicMin(T* p, std::common_type_t<T> v) {
  return cudahost::atomic_rmw(p, [=](T o) { return v < o ? v : o; });
}
template <class T>
T atomicExch(T* p, std::common_type_t<T> v) {
  return cudahost::atomic_rmw(p, [=](T) { return v; });
}
template <class T>
T atomicCAS(T* p, std::common_type_t<T> c, std::common_type_t<T> v) {
  return cudahost::atomic_rmw(p, [=](T o) { return o == c ? v : o; });
}
inline unsigned atomicInc(unsigned* p, unsigned m) {
  return cudahost::atomic_rmw(p, [=](unsigned o) { return o >= m ? 0u : o + 1; });
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::common_type_t<T> v) {
  *p = v;
}
template <class T>
void __stcg(T* p, std::common_type_t<T> v) {
  *p = v;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(b) < C(a) ? C(b) : C(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(a) < C(b) ? C(b) : C(a);
}
template <class To, class From>
To cudahost_bits(From f) {
  static_assert(sizeof(To) == sizeof(From));
  To t;
  std::memcpy(&t, &f, sizeof t);
  return t;
}
inline int __float_as_int(float f) { return cudahost_bits<int>(f); }
inline float __int_as_float(int i) { return cudahost_bits<float>(i); }
namespace cooperative_groups {

struct grid_group {
  void sync(CUDAHOST_SITE) const {
    if (!cudahost::g.cfg.cooperative) cudahost::fail("grid sync at %s:%d without a cooperative launch", file, line);
    cudahost::barrier(cudahost::g.grid, cudahost::g.blk, cudahost::g.nres, cudahost::GRID, 4, 0, file, line);
  }
};
struct cluster_group {
  void sync(CUDAHOST_SITE) const {
    auto* f = cudahost::cluster_first();
    cudahost::barrier(f->cbar, f, cudahost::g.cfg.cluster, cudahost::CLUSTER, 2, 0, file, line);
  }
  unsigned block_rank() const { return blockIdx.x % cudahost::g.cfg.cluster; }
  unsigned num_blocks() const { return cudahost::g.cfg.cluster; }
  template <class T>
  T* map_shared_rank(T* p, unsigned r) const {
    return reinterpret_cast<T*>(cudahost::cluster_first()[r].smem +
                                (reinterpret_cast<char*>(p) - cudahost::g.cur->blk->smem));
  }
};
inline grid_group this_grid() { return {}; }
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups

namespace normfused::cuda {

struct LaunchConfig {
  dim3 grid, block;
  cudaStream_t stream;
};

template <class... P, class... A>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(P...), A&&... args) {
  cudahost::launch({config.grid, config.block, 0, config.stream}, kernel, std::forward<A>(args)...);
  return cudaSuccess;
}

}  // namespace normfused::cuda
