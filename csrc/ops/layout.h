// From tensors to kernel arguments: dense views and dtypes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/types.h"

namespace normfused::ops {

// The kernels' name of a dtype. Throw for an unsupported one: dtype_of supports floating-point dtypes, any_dtype_of
// also integers.
DType dtype_of(at::ScalarType type);
DType any_dtype_of(at::ScalarType type);

// Throws unless the input has at least so many dimensions; check_floating: unless it has also a floating-point dtype.
void check_dims(const at::Tensor& input, int64_t dims = 2);
void check_floating(const at::Tensor& input, int64_t dims = 2);

// The view of a tensor of at least 2 dimensions that is dense as channels first or channels last; otherwise none.
std::optional<ChannelView> view_of(const at::Tensor& tensor);

// The tensor itself if it has a view, otherwise a copy in the memory format that torch suggests for it. Operators copy
// inputs nowhere else.
at::Tensor as_dense(const at::Tensor& tensor);

// `tensor`, or a copy, in the memory layout of `like`, which has the same shape and a view.
at::Tensor laid_out_as(const at::Tensor& tensor, const at::Tensor& like);

// `tensor` as it is if it is contiguous, otherwise a copy; none for none.
at::Tensor as_contiguous(const at::Tensor& tensor);
std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor);
std::optional<at::Tensor> laid_out_as(const std::optional<at::Tensor>& tensor, const at::Tensor& like);

// The memory of a tensor, or null for none.
const void* data_of(const std::optional<at::Tensor>& tensor);

// Precondition: a contiguous tensor of a floating-point dtype.
ChannelVector channel_vector(const at::Tensor& tensor);
ChannelVector channel_vector(const std::optional<at::Tensor>& tensor);

}  // namespace normfused::ops
