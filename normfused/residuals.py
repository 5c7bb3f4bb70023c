"""The residual, which is added before the activation: checks, and dtypes that differ from the input's."""

from __future__ import annotations

import torch
from torch import Tensor

from normfused.checks import DTYPES


def check_residual(input: Tensor, residual: Tensor, name: str = "batch_norm") -> None:
    """Raise ``TypeError`` or ``ValueError`` if ``residual`` cannot be added to ``input``."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"{name}: residual must be a tensor or None, got {type(residual).__name__}")
    if residual.shape != input.shape:
        raise ValueError(f"{name}: residual must have input's shape {tuple(input.shape)}, got {tuple(residual.shape)}")
    if residual.dtype not in DTYPES:
        raise TypeError(f"{name}: residual must be float32, float64, float16 or bfloat16, got {residual.dtype}")
    if residual.device != input.device:
        raise ValueError(f"{name}: residual is on {residual.device}, but input is on {input.device}")


def split_residual(
    input: Tensor, residual: Tensor | None, name: str = "batch_norm"
) -> tuple[Tensor | None, Tensor | None]:
    """Split ``residual`` into the part that the operators add, and the part to add after them. One of them is None.

    The operators need a residual in the dtype of ``input``. torch's addition promotes to the wider dtype. If that is
    the dtype of ``input``, the residual is converted. Otherwise the residual is added to the output of the operator,
    which is rounded to the dtype of ``input``.
    """
    if residual is None or getattr(residual, "dtype", None) == input.dtype:
        return residual, None
    check_residual(input, residual, name)
    if torch.promote_types(input.dtype, residual.dtype) == input.dtype:
        return residual.to(input.dtype), None
    return None, residual
