#include "ops/backend.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/kernels.h"

namespace normfused::ops {

namespace {

// Asked of the driver once for each device.
const cuda::DeviceLimits& limits_of(at::DeviceIndex device) {
  static const std::vector<cuda::DeviceLimits> limits = [] {
    std::vector<cuda::DeviceLimits> all(static_cast<size_t>(c10::cuda::device_count()));
    for (size_t i = 0; i < all.size(); ++i) {
      int l2_bytes = 0;
      C10_CUDA_CHECK(
          cudaDeviceGetAttribute(&all[i].multiprocessors, cudaDevAttrMultiProcessorCount, static_cast<int>(i)));
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, static_cast<int>(i)));
      all[i].l2_bytes = l2_bytes;
    }
    return all;
  }();
  return limits.at(static_cast<size_t>(device));
}

// Memory from torch's allocator, of the current device and stream.
class TorchResources : public cuda::Resources {
 public:
  explicit TorchResources(const at::Device& device)
      : Resources(limits_of(device.index()), c10::cuda::getCurrentCUDAStream(device.index())), device_(device) {}

  // Given back when the operator returns: the allocator hands it on to later work of this stream only.
  void* scratch(int64_t bytes) override { return keep(at::empty({bytes}, options(at::kByte))); }

  // Zeroed once for each stream, whose launches follow one another. A graph can be replayed on any stream, beside this
  // one: it gets tickets of its own.
  unsigned* tickets(int64_t count) override {
    if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None)
      return static_cast<unsigned*>(keep(at::zeros({count}, options(at::kInt))));
    static std::mutex mutex;
    // Never destroyed: at exit the allocator may be gone before it.
    static auto* const of_streams = new std::map<std::pair<at::DeviceIndex, cudaStream_t>, at::Tensor>;
    const std::lock_guard<std::mutex> lock(mutex);
    at::Tensor& tickets = (*of_streams)[{device_.index(), stream}];
    if (!tickets.defined() || tickets.numel() < count)
      tickets = at::zeros({std::max<int64_t>(count, kFirstTickets)}, options(at::kInt));
    return static_cast<unsigned*>(tickets.mutable_data_ptr());
  }

 private:
  static constexpr int64_t kFirstTickets = 4096;

  at::TensorOptions options(at::ScalarType type) const { return at::TensorOptions(type).device(device_); }
  void* keep(at::Tensor tensor) {
    memory_.push_back(std::move(tensor));
    return memory_.back().mutable_data_ptr();
  }

  at::Device device_;
  std::vector<at::Tensor> memory_;
};

template <class Args>
std::string extents(const Args& args) {
  const ChannelView& view = args.view;
  return c10::str(view.outer, " x ", view.channels, " x ", view.inner, " values (outer, channels, inner)");
}
std::string extents(const Standardize& args) {
  return c10::str(args.images, " images of ", args.channels, " x ", args.pixels, " values");
}
std::string extents(const MergeRanks& args) { return c10::str(args.ranks, " ranks of ", args.channels, " channels"); }

template <class Args>
void run(const char* name, cudaError_t (*kernel)(const Args&, cuda::Resources&), const Args& args,
         const at::Device& device) {
  const c10::cuda::CUDAGuard guard(device);
  TorchResources resources(device);
  const cudaError_t error = kernel(args, resources);
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // it is told here, and should not be told again by what comes next
  TORCH_CHECK(false, "normfused::", name, " on ", device, ", ", extents(args), ": ", cudaGetErrorString(error));
}

}  // namespace

const Backend kCudaBackend{
    [](const BatchNormForward& args, const at::Device& device) {
      run("batch_norm_training", cuda::batch_norm_training, args, device);
    },
    [](const BatchNormForward& args, const at::Device& device) {
      run("batch_norm_inference", cuda::batch_norm_inference, args, device);
    },
    [](const BatchNormBackward& args, const at::Device& device) {
      run("batch_norm_backward", cuda::batch_norm_backward, args, device);
    },
    [](const ChannelStats& args, const at::Device& device) {
      run("channel_moments", cuda::channel_moments, args, device);
    },
    [](const ChannelStats& args, const at::Device& device) { run("channel_sums", cuda::channel_sums, args, device); },
    [](const PackMoments& args, const at::Device& device) { run("pack_moments", cuda::pack_moments, args, device); },
    [](const MergeRanks& args, const at::Device& device) { run("merge_ranks", cuda::merge_ranks, args, device); },
    [](const Standardize& args, const at::Device& device) { run("standardize", cuda::standardize, args, device); },
    [](const LocalResponseNorm& args, const at::Device& device) {
      if (cuda::plan_windows(args).chunk == 0) return false;
      run("local_response_norm", cuda::local_response_norm, args, device);
      return true;
    },
};

}  // namespace normfused::ops
