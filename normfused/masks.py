"""Positions that are left out: masks are checked, and what they name is brought together and put back."""

from __future__ import annotations

import torch
from torch import Tensor

from normfused._torch_private import assert_async
from normfused.layout import as_dense, laid_out_as
from normfused.residuals import check_residual


def check_mask(name: str, mask: Tensor, input: Tensor) -> None:
    """Raise where ``mask`` does not name positions of ``input``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: mask must be a bool tensor, got {got}")
    shape = (*input.shape[:1], *input.shape[2:])
    if mask.shape != shape:
        raise ValueError(
            f"{name}: mask must have the shape of input without its channels, {tuple(shape)}, got {tuple(mask.shape)}"
        )
    if mask.device != input.device:
        raise ValueError(f"{name}: mask is on {mask.device}, but input is on {input.device}")


def positions_of(mask: Tensor) -> tuple[Tensor, ...]:
    """The indices of the positions that are present. Their number is not known before the device has counted them.

    This is the one point where a call with a mask waits for the device. Indexing by the mask would wait each time.
    """
    return mask.nonzero().unbind(1)


def some_positions_of(name: str, mask: Tensor, input: Tensor) -> tuple[Tensor, ...]:
    """The same. Raises where there is nothing to train with; compiled code raises ``RuntimeError`` when it runs."""
    compiling = torch.compiler.is_compiling()
    if compiling:  # first, because compilers check the number of positions too, with a message of their own
        assert_async((mask.sum() > 1) | (input.numel() == 0), f"{name}: mask has less than 2 valid positions")
    positions = positions_of(mask)
    if not compiling and input.numel() != 0 and positions[0].numel() == 0:
        raise ValueError(f"{name}: mask has no valid position")
    return positions


def masked_rows(positions: tuple[Tensor, ...], input: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """These positions of ``input`` and ``residual``, as the rows of matrices."""
    if residual is not None:
        check_residual(input, residual)
        residual = residual.movedim(1, -1)[positions]
    return input.movedim(1, -1)[positions], residual


def masked_zeros(mask: Tensor, input: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``input`` and ``residual`` with zeros at the positions that are left out."""
    if residual is not None:
        check_residual(input, residual)
        residual = torch.where(mask.unsqueeze(1), residual, 0)
    return torch.where(mask.unsqueeze(1), as_dense(input), 0), residual


def unmasked(positions: tuple[Tensor, ...], rows: Tensor, input: Tensor) -> Tensor:
    """The rows put back to their positions in a tensor of ``input``'s shape; zeros elsewhere."""
    output = rows.new_zeros(input.movedim(1, -1).shape).index_put(positions, rows).movedim(-1, 1)
    return laid_out_as(output, input)
