"""Memory layouts: which one a result has, and how plain torch produces it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfused._torch_private import is_transformed, suggest_memory_format


def values_per_channel(input: Tensor) -> int:
    """Number of values of each channel (dim 1) of ``input``."""
    return input.numel() // max(input.size(1), 1)


def as_dense(input: Tensor) -> Tensor:
    """``input`` itself if it is dense as channels first or channels last; else a copy in the format torch suggests."""
    if input.is_contiguous() or input.movedim(1, -1).is_contiguous():
        return input
    return input.contiguous(memory_format=suggest_memory_format(input))


def laid_out_as(values: Tensor, input: Tensor) -> Tensor:
    """A copy of ``values`` in the memory layout that results of ``input`` have."""
    return _with_strides(values, _result_strides(input))


def keep_layout(input: Tensor) -> Tensor:
    """``input``, with a gradient in its memory layout. Under transforms torch chooses the layout of the gradient."""
    if is_transformed():
        return input
    output: Tensor = _KeepLayout.apply(input)  # type: ignore[no-untyped-call]
    return output


def _result_strides(input: Tensor) -> tuple[int, ...]:
    return torch.empty_like(as_dense(input), device="meta").stride()


def _with_strides(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    # Allocated from `values`: vmap may batch them, but not the tensor that the strides are from.
    return values.new_empty_strided(values.shape, strides).copy_(values)


class _KeepLayout(torch.autograd.Function):
    """The identity. Its gradient has the memory layout of its input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.strides = _result_strides(input)
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _with_strides(grad, ctx.strides)
