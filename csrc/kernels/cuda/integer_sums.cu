#include "kernels/cuda/channel_stats_launch.cuh"

namespace normfused::cuda {

cudaError_t integer_sums(const IntegerSums& args, Resources& resources) {
  return for_integer(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Op = IntegerSumsOp<T>;
    return channel_stats<Op>(args, resources, [&](int k) {
      const int row = k < Op::kParts ? integer_row<T>(k) : IntegerSums::kMin + k - Op::kParts;
      return args.rows + row * args.view.channels;
    });
  });
}

}  // namespace normfused::cuda
