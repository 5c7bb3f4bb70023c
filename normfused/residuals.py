"""What is added to a normalized tensor before its activation: checks, and dtypes other than the input's."""

from __future__ import annotations

import torch
from torch import Tensor

from normfused.checks import DTYPES


def check_residual(input: Tensor, residual: Tensor) -> None:
    """Raise where ``residual`` cannot be added to ``input``."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"batch_norm: residual must be a tensor or None, got {type(residual).__name__}")
    if residual.shape != input.shape:
        raise ValueError(
            f"batch_norm: residual must have input's shape {tuple(input.shape)}, got {tuple(residual.shape)}"
        )
    if residual.dtype not in DTYPES:
        raise TypeError(f"batch_norm: residual must be float32, float64, float16 or bfloat16, got {residual.dtype}")
    if residual.device != input.device:
        raise ValueError(f"batch_norm: residual is on {residual.device}, but input is on {input.device}")


def split_residual(input: Tensor, residual: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``residual`` in ``input``'s dtype, for the operators to add; or None, and ``residual`` to be added afterwards.

    The operators know one dtype. torch's addition promotes to the wider one: where that is not ``input``'s, the sum is
    that of the output, rounded to ``input``'s dtype, and ``residual``.
    """
    if residual is None or getattr(residual, "dtype", None) == input.dtype:
        return residual, None
    check_residual(input, residual)
    if torch.promote_types(input.dtype, residual.dtype) == input.dtype:
        return residual.to(input.dtype), None
    return None, residual
