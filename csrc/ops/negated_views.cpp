// Views that negate the memory they show, such as the imaginary part of a conjugate. torch's own kernel copies those
// that an operator reads, but fails an assertion for operators that write to one of several arguments.
#include <ATen/core/Tensor.h>

#include "ops/registration.h"

namespace normfused::ops {

namespace {

// Copies the negated views that the operator reads, and throws for those that it writes to.
void without_negated_views(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[stack->size() - arguments.size() + i];
    if (!value.isTensor() || !value.toTensor().is_neg()) continue;
    const auto* const alias = arguments[i].alias_info();
    TORCH_CHECK(alias == nullptr || !alias->isWrite(), arguments[i].name(),
                " is written to, but it is a view that negates its memory; pass a copy: .resolve_neg()");
    value = value.toTensor().resolve_neg();
  }
  op.callBoxed(stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(normfused, Negative, m) {
  for (const char* const name : {"batch_norm_training", "batch_norm_training_", "batch_norm_inference_", "merge_ranks",
                                 "standardize_", "standardize_out"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&without_negated_views>());
}

}  // namespace normfused::ops
