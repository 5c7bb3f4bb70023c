#include "ops/layout.h"

#include <ATen/Functions.h>

#include "ops/output_memory.h"

namespace normfused::ops {

namespace {

at::Tensor copy_in(at::MemoryFormat format, const at::Tensor& tensor) {
  return empty_output(tensor.sizes(), tensor.options().memory_format(format)).copy_(tensor);
}

// Whether the channels are contiguous, and the other dimensions are dense in their own order outside of them.
bool is_channels_last(const at::Tensor& tensor) {
  if (tensor.size(1) != 1 && tensor.stride(1) != 1) return false;
  int64_t expected = tensor.size(1);
  for (int64_t dim = tensor.dim() - 1; dim >= 0; --dim) {
    if (dim == 1) continue;
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

}  // namespace

DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "expected float32, float64, float16 or bfloat16, got ", type);
  }
}

DType any_dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kByte:
      return DType::kUInt8;
    case at::kChar:
      return DType::kInt8;
    case at::kShort:
      return DType::kInt16;
    case at::kInt:
      return DType::kInt32;
    case at::kLong:
      return DType::kInt64;
    default:
      return dtype_of(type);
  }
}

void check_dims(const at::Tensor& input, int64_t dims) {
  TORCH_CHECK_VALUE(input.dim() >= dims, "input needs at least ", dims, " dimensions, got shape ", input.sizes());
}

void check_floating(const at::Tensor& input, int64_t dims) {
  check_dims(input, dims);
  dtype_of(input.scalar_type());
}

std::optional<ChannelView> view_of(const at::Tensor& tensor) {
  const int64_t channels = tensor.size(1);
  if (tensor.is_contiguous()) {
    const int64_t outer = tensor.size(0);
    const int64_t rows = outer * channels;
    const int64_t inner = rows == 0 ? 0 : tensor.numel() / rows;
    // A tensor with one channel is a single row of elements, whatever its shape.
    if (channels == 1 && outer * inner > 1) return ChannelView{1, 1, outer * inner};
    return ChannelView{outer, channels, inner};
  }
  if (is_channels_last(tensor)) return ChannelView{tensor.numel() / channels, channels, 1};
  return std::nullopt;
}

at::Tensor as_dense(const at::Tensor& tensor) {
  return view_of(tensor) ? tensor : copy_in(tensor.suggest_memory_format(), tensor);
}

at::Tensor laid_out_as(const at::Tensor& tensor, const at::Tensor& like) {
  if (tensor.strides() == like.strides()) return tensor;
  if (like.is_contiguous()) return tensor.is_contiguous() ? tensor : copy_in(at::MemoryFormat::Contiguous, tensor);
  if (is_channels_last(tensor)) return tensor;
  return at::empty_like(like, tensor.options()).copy_(tensor);
}

at::Tensor as_contiguous(const at::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : copy_in(at::MemoryFormat::Contiguous, tensor);
}

std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(tensor->contiguous()) : std::nullopt;
}

std::optional<at::Tensor> laid_out_as(const std::optional<at::Tensor>& tensor, const at::Tensor& like) {
  return tensor ? std::optional(laid_out_as(*tensor, like)) : std::nullopt;
}

const void* data_of(const std::optional<at::Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

ChannelVector channel_vector(const at::Tensor& tensor) { return {tensor.data_ptr(), dtype_of(tensor.scalar_type())}; }

ChannelVector channel_vector(const std::optional<at::Tensor>& tensor) {
  return tensor ? channel_vector(*tensor) : ChannelVector{};
}

}  // namespace normfused::ops
