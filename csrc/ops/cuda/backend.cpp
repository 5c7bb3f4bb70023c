#include "ops/backend.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/tickets.h"

namespace normfused::ops {

namespace {

// Whether an optimization has not been disabled by an environment variable that is 0, to measure what it gains.
bool is_enabled(const char* variable) {
  const char* const text = std::getenv(variable);
  return text == nullptr || std::strcmp(text, "0") != 0;
}

// Every device with clusters supports this size.
constexpr int kMaxCluster = 8;

// The limits of a device, queried from the driver once per process.
const cuda::DeviceLimits& limits_of(at::DeviceIndex device) {
  static const std::vector<cuda::DeviceLimits> limits = [] {
    std::vector<cuda::DeviceLimits> all(static_cast<size_t>(c10::cuda::device_count()));
    for (size_t i = 0; i < all.size(); ++i) {
      int l2_bytes = 0, shared_bytes = 0;
      C10_CUDA_CHECK(
          cudaDeviceGetAttribute(&all[i].multiprocessors, cudaDevAttrMultiProcessorCount, static_cast<int>(i)));
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, static_cast<int>(i)));
      C10_CUDA_CHECK(
          cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(i)));
      all[i].l2_bytes = l2_bytes;
      all[i].shared_bytes = is_enabled("NORMFUSED_CUDA_STAGED") ? shared_bytes : 0;
      const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(i));
      const bool is_sm90 = cuda::has_sm90_launches();
      all[i].overlap = is_enabled("NORMFUSED_CUDA_OVERLAP") && is_sm90;
      all[i].pipelines = is_enabled("NORMFUSED_CUDA_PIPELINE");
      all[i].max_cluster = is_enabled("NORMFUSED_CUDA_CLUSTERS") && is_sm90 ? kMaxCluster : 1;
    }
    return all;
  }();
  return limits.at(static_cast<size_t>(device));
}

// Allocates zeroed device memory, not from torch's caching allocator: during the warm-up or capture of a graph that
// would place it in the graph's private pool, and the graph would record the memset. The memory is never freed.
unsigned* zeros(int device, int64_t count) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(
      cudaStreamCaptureModeRelaxed);  // allows cudaMalloc during a capture
  const size_t bytes = static_cast<size_t>(count) * sizeof(unsigned);
  void* memory = nullptr;
  cudaError_t error = cudaMalloc(&memory, bytes);
  if (error == cudaErrorMemoryAllocation) {  // torch's allocator may cache unused memory
    (void)cudaGetLastError();
    c10::cuda::CUDACachingAllocator::emptyCache();
    error = cudaMalloc(&memory, bytes);
  }
  C10_CUDA_CHECK(error);
  // Not on the legacy default stream, which would wait for streams that may be capturing.
  cudaStream_t stream = nullptr;
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream));
  C10_CUDA_CHECK(cudaStreamSynchronize(stream));
  C10_CUDA_CHECK(cudaStreamDestroy(stream));
  return static_cast<unsigned*>(memory);
}

// A number for the calling thread, unique in the process.
uint64_t this_thread() {
  static std::atomic<uint64_t> threads{0};
  thread_local const uint64_t thread = ++threads;
  return thread;
}

// Identifies the launches that share tickets; see kernels/cuda/tickets.h.
cuda::TicketKey ticket_key(c10::DeviceIndex device, cudaStream_t stream) {
  unsigned long long id = 0, capture = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamGetId(stream, &id));
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &capture));
  if (status == cudaStreamCaptureStatusNone) capture = 0;
  return {device, id, stream == cudaStreamPerThread ? this_thread() : 0, capture};
}

// Scratch memory comes from torch's allocator, for the current stream of the device.
class TorchResources : public cuda::Resources {
 public:
  explicit TorchResources(const at::Device& device)
      : Resources(limits_of(device.index()), c10::cuda::getCurrentCUDAStream(device.index())), device_(device) {}

  // Freed when the operator returns. That is safe: the allocator reuses it only for later work of the same stream.
  void* scratch(int64_t bytes) override {
    memory_.push_back(at::empty({bytes}, at::TensorOptions(at::kByte).device(device_)));
    return memory_.back().mutable_data_ptr();
  }

  unsigned* tickets(int64_t count) override {
    static auto* const tickets = new cuda::Tickets(zeros);  // never destroyed: other threads may still launch at exit
    return tickets->of(ticket_key(device_.index(), stream), count);
  }

 private:
  at::Device device_;
  std::vector<at::Tensor> memory_;
};

// The extents of the operands, for error messages.
template <class Args>
std::string extents(const Args& args) {
  const ChannelView& view = args.view;
  return c10::str(view.outer, " x ", view.channels, " x ", view.inner, " values (outer, channels, inner)");
}
std::string extents(const Standardize& args) {
  return c10::str(args.images, " images of ", args.channels, " x ", args.pixels, " values");
}
template <class Args>
  requires std::is_same_v<decltype(Args::view), GroupView>
std::string extents(const Args& args) {
  const GroupView& view = args.view;
  return c10::str(view.samples, " samples of ", view.groups, " groups, ", view.channels, " x ", view.inner, " values");
}
std::string extents(const MergeRanks& args) { return c10::str(args.ranks, " ranks of ", args.channels, " channels"); }

// Runs the launches of a kernel on the current stream of a device, and throws if one could not be started.
template <class Args>
void run(const char* name, cudaError_t (*kernel)(const Args&, cuda::Resources&), const Args& args,
         const at::Device& device) {
  const c10::cuda::CUDAGuard guard(device);
  TorchResources resources(device);
  const cudaError_t error = kernel(args, resources);
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // reported here, so that the next CUDA call does not report it again
  TORCH_CHECK(false, "normfused::", name, " on ", device, ", ", extents(args), ": ", cudaGetErrorString(error));
}

}  // namespace

const Backend kCudaBackend{
#define NF_KERNEL(name, Args) [](const Args& args, const at::Device& device) { run(#name, cuda::name, args, device); },
#include "kernels/list.h"
    [](const LocalResponseNorm& args) { return cuda::plan_windows(args).chunk > 0; },
};

}  // namespace normfused::ops
