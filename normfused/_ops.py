"""What compilers need to know of the operators: shapes, dtypes and strides of their results, without running them."""

from __future__ import annotations

import torch
from torch import Tensor


def _has_view(input: Tensor) -> bool:
    """Whether `input` is dense as channels first or as channels last, as `view_of` in csrc/ops/layout.cpp sees it."""
    return input.is_contiguous() or input.movedim(1, -1).is_contiguous()


def _output_like(input: Tensor) -> Tensor:
    if _has_view(input):
        return torch.empty_like(input)
    return torch.empty_like(input, memory_format=torch._prims_common.suggest_memory_format(input))


def _statistics(input: Tensor) -> Tensor:
    return input.new_empty((2, input.size(1)), dtype=torch.float64)


@torch.library.register_fake("normfused::batch_norm_training")
def _batch_norm_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _output_like(input), _statistics(input)


@torch.library.register_fake("normfused::batch_norm_inference")
def _batch_norm_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _output_like(input), _statistics(input)


@torch.library.register_fake("normfused::batch_norm_backward")
def _batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    training: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if weight is not None:
        dtype = weight.dtype
    else:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    grad_input = _output_like(input) if output_mask[0] else input.new_empty((0,))
    grad_weight, grad_bias = (
        input.new_empty((input.size(1) if wanted else 0,), dtype=dtype) for wanted in output_mask[1:]
    )
    return grad_input, grad_weight, grad_bias


@torch.library.register_fake("normfused::channel_moments")
def _channel_moments(input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, m2, low, high = (input.new_empty((input.size(1),), dtype=torch.float64) for _ in range(4))
    return mean, m2, low, high


@torch.library.register_fake("normfused::channel_sums")
def _channel_sums(input: Tensor) -> tuple[Tensor, Tensor]:
    total, squares = (input.new_empty((input.size(1),), dtype=torch.float64) for _ in range(2))
    return total, squares
