#include "kernels/cuda/local_response_norm.cuh"

#include "kernels/cuda/launch.cuh"

namespace normfused::cuda {

cudaError_t local_response_norm(const LocalResponseNorm& args, Resources& resources) {
  const WindowPlan plan = plan_windows(args);
  if (plan.chunk == 0) return cudaErrorInvalidValue;
  const LaunchConfig config{dim3(extent(plan.tiles * plan.chunks)), dim3(kThreads), resources.stream};
  return for_floating(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto start = [&](auto kernel) { return launch(config, kernel, args, plan, response_of<compute_t<T>>(args)); };
    const bool last = args.view.inner == 1;
    if (args.grad_output == nullptr) return last ? start(response_forward<T, true>) : start(response_forward<T, false>);
    return last ? start(response_backward<T, true>) : start(response_backward<T, false>);
  });
}

}  // namespace normfused::cuda
