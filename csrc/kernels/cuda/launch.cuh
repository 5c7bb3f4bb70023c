// Shared by the launchers: dispatch on dtypes, and the device memory that plans need.
#pragma once

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/reduce.cuh"

namespace normfused::cuda {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>) with the floating type of a dtype.
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

// The same for integer dtypes.
template <class F>
cudaError_t for_integer(DType dtype, const F& f) {
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
      return cudaErrorInvalidValue;
  }
}

// Whether every pointer is aligned for vector accesses; a null pointer is.
template <class... P>
bool all_aligned(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kAccessBytes == 0) && ...);
}

// How many blocks of a reduction's kernels a multiprocessor holds at once. The driver is asked once per process: mixed
// devices are rare, and a plan made for another device is correct, only less balanced.
template <class Op, class Finish>
const Residency& residency_of() {
  constexpr int kValues = values_per_access(sizeof(typename Op::T));
  static const Residency residency{
      resident_blocks(reduce_rows<Op, Finish, NoApply, kValues, false>, kThreads, kMinBlocks),
      resident_blocks(reduce_rows<Op, Finish, NoApply, kValues, true>, kThreads, kMinBlocks),
      resident_blocks(reduce_columns<Op, Finish, NoApply, kValues>, kThreads, kMinBlocks)};
  return residency;
}

template <class Op, class Finish>
ReductionPlan plan_for(const Op& op, const Finish&, const Reduced& reduced, const Resources& resources) {
  return plan_reduction(op.view, reduced, resources.limits, residency_of<Op, Finish>());
}

// Allocates the partial sums and tickets of a reduction and starts it.
template <class Op, class Finish, class Apply>
cudaError_t reduce(const Op& op, const Finish& finish, const Apply& apply, const ReductionPlan& plan,
                   Resources& resources) {
  using Sum = typename Op::Sum;
  const int64_t channels = op.view.statistics(), count = plan.splits() * Op::kSums * channels;
  Partials<Sum> partials{};
  partials.data = static_cast<Sum*>(resources.scratch(count * static_cast<int64_t>(sizeof(Sum))));
  partials.channels = channels;
  partials.splits = plan.splits();
  partials.group = plan.group;
  partials.groups = plan.groups();
  const int64_t tickets = plan.tiles() * Partials<Sum>::tickets_per_tile(plan.groups());
  if constexpr (!std::is_same_v<Apply, NoApply> && !contracts::FinishesTogether<Finish>::value)
    if (plan.pipelined() || plan.persistent()) {
      partials.tickets = resources.tickets(tickets + plan.tiles() + 1);
      unsigned* const counters = partials.tickets + tickets;
      if (plan.pipelined()) return reduce_pipelined(op, finish, apply, plan.rows, partials, counters, resources.stream);
      const int64_t numbers = plan.tiles() * plan.splits() * static_cast<int64_t>(sizeof(unsigned));
      return reduce_persistent(op, finish, apply, plan.columns, partials, counters,
                               static_cast<unsigned*>(resources.scratch(numbers)), resources.stream);
    }
  if (plan.splits() > 1 && std::is_same_v<Apply, NoApply>) partials.tickets = resources.tickets(tickets);
  return reduce(op, finish, apply, plan, partials, resources.stream);
}

// Allocates a table of coefficients for an apply Op.
template <class Op>
typename Op::S* table_for(const ChannelView& view, Resources& resources) {
  using S = typename Op::S;
  return static_cast<S*>(resources.scratch(Op::kCoefficients * view.statistics() * static_cast<int64_t>(sizeof(S))));
}

}  // namespace normfused::cuda
