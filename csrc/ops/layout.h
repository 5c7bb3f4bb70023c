// From tensors to what kernels take: dense views, dtypes, and freshly allocated outputs.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/types.h"

namespace normfused::ops {

// Floating types; any_dtype_of: integers too.
DType dtype_of(at::ScalarType type);
DType any_dtype_of(at::ScalarType type);

// The view of a tensor that is dense as channels first or as channels last (of any rank >= 2); nothing otherwise.
std::optional<ChannelView> view_of(const at::Tensor& tensor);

// The tensor itself where it has a view, else a copy in the memory format torch suggests for it. The one place where
// inputs are copied.
at::Tensor as_dense(const at::Tensor& tensor);

// Values of `tensor` laid out in memory as those of `like`, which has a view.
at::Tensor laid_out_as(const at::Tensor& tensor, const at::Tensor& like);

// Uninitialized tensors. Large ones are asked for in huge pages: on a fresh output of 100 MB page
// faults cost more time than all the arithmetic.
at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format);
at::Tensor empty_output_like(const at::Tensor& like);

ChannelVector channel_vector(const at::Tensor& tensor);
ChannelVector channel_vector(const std::optional<at::Tensor>& tensor);

}  // namespace normfused::ops
