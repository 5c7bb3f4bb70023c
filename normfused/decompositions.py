"""The operators of evaluation in terms of torch's own: what jit traces, ONNX exporters and decompositions get.

What torch knows about ``aten::batch_norm`` then applies, such as folding it into a convolution. Results agree with the
kernels' to the rounding of the input's dtype. Everything here is differentiable by torch's autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from normfused.activations import ACTIVATIONS


def batch_norm_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_param: float = 0.0,
) -> Tensor:
    """``activation(batch_norm(input) + residual)`` by running statistics."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    if residual is not None:
        output = output + residual
    return ACTIVATIONS[activation](output, activation_param)


def local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """As the operator of that name; float16 and bfloat16, for which torch has no pooling on the CPU, in float32."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    return F.local_response_norm(input.to(dtype), size, alpha, beta, k).to(input.dtype)


def standardize(
    input: Tensor,
    mean: list[float],
    std: list[float],
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """As the operator of that name, in float32 where neither input nor output is float64."""
    dtype = dtype or (torch.float32 if input.dtype == torch.uint8 else input.dtype)
    wide = torch.promote_types(torch.promote_types(input.dtype, dtype), torch.float32)
    # Not torch.tensor, which a trace cannot hold as a function.
    centre, deviation = (
        torch.stack([torch.full((1, 1), value, dtype=wide, device=input.device) for value in values])
        for values in (mean, std)
    )
    output = ((input.to(wide) * scale - centre) / deviation).to(dtype)
    if memory_format in (None, torch.preserve_format):
        return output
    return output.contiguous(memory_format=memory_format)
