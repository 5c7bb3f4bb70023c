"""Masks: checks, and gathering and scattering of the positions that are present."""

from __future__ import annotations

import torch
from torch import Tensor

from normfused._torch_private import assert_async
from normfused.layout import as_dense, laid_out_as
from normfused.residuals import check_residual


def check_mask(name: str, mask: Tensor, input: Tensor) -> None:
    """Raise ``TypeError`` or ``ValueError`` if ``mask`` is not a mask of the positions of ``input``."""
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
    """The indices of the positions that are present, one tensor for each dimension of ``mask``.

    The number of positions depends on values, so this waits for the device. It is the only wait of a call with a mask;
    indexing with the mask itself would wait each time.
    """
    return mask.nonzero().unbind(1)


def some_positions_of(name: str, mask: Tensor, input: Tensor) -> tuple[Tensor, ...]:
    """:func:`positions_of` for training.

    Raises:
        ValueError: no position is present. Compiled code raises ``RuntimeError`` when it runs, for less than two.
    """
    compiling = torch.compiler.is_compiling()
    if compiling:  # before nonzero(), after which compilers check the number with another message
        assert_async((mask.sum() > 1) | (input.numel() == 0), f"{name}: mask has less than 2 valid positions")
    positions = positions_of(mask)
    if not compiling and input.numel() != 0 and positions[0].numel() == 0:
        raise ValueError(f"{name}: mask has no valid position")
    return positions


def masked_rows(positions: tuple[Tensor, ...], input: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The given positions of ``input`` and ``residual`` as matrices of shape (positions, C)."""
    if residual is not None:
        check_residual(input, residual)
        residual = residual.movedim(1, -1)[positions]
    return input.movedim(1, -1)[positions], residual


def masked_zeros(mask: Tensor, input: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``input`` and ``residual`` with zeros at the excluded positions."""
    if residual is not None:
        check_residual(input, residual)
        residual = torch.where(mask.unsqueeze(1), residual, 0)
    return torch.where(mask.unsqueeze(1), as_dense(input), 0), residual


def unmasked(positions: tuple[Tensor, ...], rows: Tensor, input: Tensor) -> Tensor:
    """A tensor of the shape and layout of ``input`` with the rows at their positions and zeros elsewhere."""
    output = rows.new_zeros(input.movedim(1, -1).shape).index_put(positions, rows).movedim(-1, 1)
    return laid_out_as(output, input)
