// What the launchers share: from dtype tags to types, and from plans to memory.
#pragma once

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/reduce.cuh"

namespace normfused::cuda {

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>) for the floating type of a tag.
template <class F>
cudaError_t for_floating(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Type<float>{});
    case DType::kFloat64:
      return f(Type<double>{});
    case DType::kFloat16:
      return f(Type<__half>{});
    case DType::kBFloat16:
      return f(Type<__nv_bfloat16>{});
    default:
      return cudaErrorInvalidValue;
  }
}

// The same for integers too.
template <class F>
cudaError_t for_any(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kUInt8:
      return f(Type<uint8_t>{});
    case DType::kInt8:
      return f(Type<int8_t>{});
    case DType::kInt16:
      return f(Type<int16_t>{});
    case DType::kInt32:
      return f(Type<int32_t>{});
    case DType::kInt64:
      return f(Type<int64_t>{});
    default:
      return for_floating(dtype, f);
  }
}

template <class... P>
bool all_aligned(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kAccessBytes == 0) && ...);
}

template <class Op, class Finish, class Apply>
cudaError_t reduce(const Op& op, const Finish& finish, const Apply& apply, const ReductionPlan& plan,
                   Resources& resources) {
  using Sum = typename Op::Sum;
  const int64_t count = plan.splits() * Op::kSums * plan.results();
  const Partials<Sum> partials{static_cast<Sum*>(resources.scratch(count * static_cast<int64_t>(sizeof(Sum)))),
                               plan.splits() > 1 ? resources.tickets(plan.tiles()) : nullptr, plan.results()};
  return reduce(op, finish, apply, plan, partials, resources.stream);
}

// A table of coefficients.
template <class Op>
typename Op::S* table_for(const ChannelView& view, Resources& resources) {
  using S = typename Op::S;
  return static_cast<S*>(resources.scratch(Op::kCoefficients * view.channels * static_cast<int64_t>(sizeof(S))));
}

}  // namespace normfused::cuda
