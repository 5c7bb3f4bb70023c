"""The operators of evaluation composed of torch's own operators, for jit traces, ONNX export and decompositions.

torch's passes for ``aten::batch_norm``, such as folding into a convolution, then apply. Results agree with those of the
kernels up to rounding of the input's dtype. Autograd differentiates all functions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from normfused.activations import ACTIVATIONS


def batch_norm_inference(
    # the parameters of the operator
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
    """``activation(batch_norm(input) + residual)`` with running statistics. Arguments are those of the operator."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    if residual is not None:
        output = output + residual
    return ACTIVATIONS[activation](output, activation_param)


def group_norm(
    # the parameters of the operator
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_param: float = 0.0,
) -> Tensor:
    """``activation(group_norm(input) + residual)``. ``weight`` and ``bias``: shape (C,) or (N, C)."""
    if all(parameter is None or parameter.dim() == 1 for parameter in (weight, bias)):
        output = F.group_norm(input, num_groups, weight, bias, eps)
    else:
        output = F.group_norm(input, num_groups, None, None, eps)
        shape = (-1, input.size(1), *[1] * (input.dim() - 2))
        output = output if weight is None else output * weight.reshape(shape)
        output = (output if bias is None else output + bias.reshape(shape)).to(input.dtype)
    if residual is not None:
        output = output + residual
    return ACTIVATIONS[activation](output, activation_param)


def layer_norm(
    # the parameters of the operator
    input: Tensor,
    start_dim: int,
    end_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    subtract_mean: bool = True,
) -> tuple[Tensor, Tensor]:
    """Layer norm or RMS norm over dimensions ``start_dim`` to ``end_dim``, and what was normalized."""
    x = input if residual is None else input + residual
    normalized = end_dim + 1 - start_dim
    source, target = range(start_dim, end_dim + 1), range(-normalized, 0)
    moved = x.movedim(tuple(source), tuple(target))
    shape = moved.shape[-normalized:]
    plain = all(p is None or (p.dim() == normalized and p.dtype == x.dtype) for p in (weight, bias))
    given = (weight, bias) if plain else (None, None)
    output = F.layer_norm(moved, shape, *given, eps) if subtract_mean else F.rms_norm(moved, shape, given[0], eps)
    for parameter, is_weight in ((weight, True), (bias, False)):
        if parameter is None or (plain and (is_weight or subtract_mean)):
            continue
        if parameter.dim() > normalized:  # of each sample
            parameter = parameter.reshape(-1, *[1] * (x.dim() - 1 - normalized), *shape)
        output = output * parameter if is_weight else output + parameter
    return output.to(x.dtype).movedim(tuple(target), tuple(source)), x


def local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """The operator ``local_response_norm``. float16 and bfloat16 are computed in float32, which torch can pool."""
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
    """The operator ``standardize``. The arithmetic is in float64 if input or output is, else in float32."""
    dtype = dtype or (torch.float32 if input.dtype == torch.uint8 else input.dtype)
    wide = torch.promote_types(torch.promote_types(input.dtype, dtype), torch.float32)
    # torch.tensor cannot be part of a trace as a function; torch.full can.
    center, deviation = (
        torch.stack([torch.full((1, 1), value, dtype=wide, device=input.device) for value in values])
        for values in (mean, std)
    )
    output = ((input.to(wide) * scale - center) / deviation).to(dtype)
    if memory_format in (None, torch.preserve_format):
        return output
    return output.contiguous(memory_format=memory_format)
