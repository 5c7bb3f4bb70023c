"""Norms over the last dimensions or over the channels of each position, as functions: layer norm and RMS norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from normfused import _extension, decompositions, reference
from normfused.arguments import (
    check_input,
    check_number,
    check_parameter,
    in_float32,
    is_autocast,
    modulated_parameters,
)
from normfused.checks import needs_torchs_operators
from normfused.residuals import check_residual

__all__ = ["layer_norm", "layer_norm2d", "rms_norm", "rms_norm2d"]


class LayerNormCall(NamedTuple):
    """One call: the arguments of :func:`layer_norm`, its name in errors, and what is normalized."""

    name: str
    input: Tensor
    normalized_shape: tuple[int, ...] | None  # the last dimensions; None for the channels, dimension 1
    weight: Tensor | None
    bias: Tensor | None
    eps: float | None  # None: the epsilon of the dtype of the arithmetic
    residual: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    scale_offset: float = 0.0
    subtract_mean: bool = True

    @property
    def dims(self) -> tuple[int, int]:
        """The first and the last normalized dimension."""
        if self.normalized_shape is None:
            return 1, 1
        last = self.input.dim() - 1
        return last + 1 - len(self.normalized_shape), last

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the normalized dimensions."""
        return (self.input.size(1),) if self.normalized_shape is None else self.normalized_shape


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale_offset: float = 0.0,
) -> Any:
    """Normalize over the last dimensions; optionally add a residual before, and modulate each sample.

    ``(x - mean) / sqrt(var + eps) * (weight + scale_offset) + bias`` with ``x = input + residual``, and mean and biased
    variance over the last ``len(normalized_shape)`` dimensions. A drop-in for
    :func:`torch.nn.functional.layer_norm`.

    On the CPU the result for a row, and its gradient with respect to ``input``, do not depend on the other rows: they
    are the same to the last bit in every batch, at every place, with any number of threads.

    Args:
        input: shape ``(*, *normalized_shape)``, float32, float64, float16 or bfloat16, any strides.
        normalized_shape: sizes of the dimensions that are normalized together.
        weight, bias: shape ``normalized_shape``; default 1 and 0; ``input``'s dtype, or float32 if ``input`` is float16
            or bfloat16. All arithmetic is in float32 or wider.
        eps: added to the variance; finite and not negative; default 1e-5.
        residual: added to ``input`` before the norm; ``input``'s shape and device. A different dtype is promoted as in
            ``input + residual``.
        scale, shift: shape ``(N, *normalized_shape)`` for ``input`` of shape ``(N, ..., *normalized_shape)``, as in
            AdaLN: the result is ``norm * (1 + scale) + shift``. Dtypes as for ``weight``. Default 0.
        scale_offset: added to ``weight``: 1 for weights that are stored as their difference from 1. Default 0.

    Returns:
        A new contiguous tensor of ``input``'s shape and dtype; with ``residual`` a pair of it and ``input + residual``.
        Differentiable any number of times. Saved for backward are ``input``, or the sum, and the statistics.

    Raises:
        ValueError: a ``normalized_shape`` that is not the end of ``input``'s shape; shapes that do not fit; a negative
            eps.
        TypeError: unsupported dtypes.

    Example:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), (2,), eps=0.0)
        tensor([[-1.,  1.]])
        >>> x, residual = torch.randn(4, 8), torch.randn(4, 8)
        >>> y, total = layer_norm(x, (8,), residual=residual)
        >>> torch.equal(total, x + residual)
        True

    Source: Ba, Kiros and Hinton, 2016, arXiv:1607.06450;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.layer_norm.html
    """
    shape = _shape("layer_norm", normalized_shape)
    return run_layer_norm("layer_norm", input, shape, weight, bias, eps, residual, scale, shift, scale_offset)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale_offset: float = 0.0,
) -> Any:
    """Divide by the root of the mean square over the last dimensions; options as in :func:`layer_norm`.

    ``x / sqrt(mean(x ** 2) + eps) * (weight + scale_offset)`` with ``x = input + residual``. A drop-in for
    :func:`torch.nn.functional.rms_norm`. The squares do not overflow: a row of float32 values of 1e30 is normalized.

    Args:
        eps: added to the mean square; ``None``, the default, is the epsilon of float64 for float64 input, else that of
            float32.
        input, normalized_shape, weight, residual, scale, shift, scale_offset: as in :func:`layer_norm`.

    Returns, Raises: as :func:`layer_norm`.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 3.0]]), (2,))
        tensor([[1., 1.]])

    Source: Zhang and Sennrich, 2019, arXiv:1910.07467;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.rms_norm.html
    """
    shape = _shape("rms_norm", normalized_shape)
    return run_layer_norm("rms_norm", input, shape, weight, None, eps, residual, scale, shift, scale_offset, False)


def layer_norm2d(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale_offset: float = 0.0,
) -> Any:
    """:func:`layer_norm` over the channels of each position of ``(N, C, ...)``, in its memory layout.

    The same as moving the channels last, :func:`layer_norm` over them, and moving them back, without a copy.

    Args:
        input: shape ``(N, C, ...)``.
        weight, bias: shape ``(C,)``.
        eps: default 1e-6, as in timm.
        scale, shift: shape ``(N, C)``.
        residual, scale_offset: as in :func:`layer_norm`.

    Returns, Raises: as :func:`layer_norm`; results have ``input``'s memory format.

    Example:
        >>> layer_norm2d(torch.randn(2, 96, 7, 7), torch.ones(96)).shape
        torch.Size([2, 96, 7, 7])

    Source: Liu et al., 2022, arXiv:2201.03545 (ConvNeXt).
    """
    return run_layer_norm("layer_norm2d", input, None, weight, bias, eps, residual, scale, shift, scale_offset)


def rms_norm2d(
    input: Tensor,
    weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale_offset: float = 0.0,
) -> Any:
    """:func:`rms_norm` over the channels of each position of ``(N, C, ...)``; see :func:`layer_norm2d`.

    Example:
        >>> rms_norm2d(torch.full((1, 4, 2, 2), 5.0)).unique()
        tensor([1.])
    """
    return run_layer_norm("rms_norm2d", input, None, weight, None, eps, residual, scale, shift, scale_offset, False)


def _shape(name: str, normalized_shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(normalized_shape, int):
        raise TypeError(f"{name}: normalized_shape must be a sequence of ints, got the int {normalized_shape}")
    return tuple(normalized_shape)


def run_layer_norm(
    name: str,
    input: Tensor,
    normalized_shape: tuple[int, ...] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale_offset: float = 0.0,
    subtract_mean: bool = True,
) -> Any:
    """The functions and layers of this family, with the fields of a :class:`LayerNormCall`."""
    tensors = (input, weight, bias, residual, scale, shift)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            run_layer_norm, tensors, name, input, normalized_shape, weight, bias, eps, residual, scale, shift,
            scale_offset, subtract_mean,
        )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    plain = isinstance(input, Tensor) and residual is None and scale is None and shift is None and not scale_offset
    dims, refusal = None, None
    if plain and not (compiling or _extension.C is None or needs_torchs_operators(compiling) or is_autocast(input)):
        dims = _dims_of_operator(input, normalized_shape, weight, bias, subtract_mean)
    if dims is not None:
        assert _extension.C is not None
        start, end = dims
        try:
            output: Tensor = _extension.C.layer_norm(
                input, start, end, weight, bias, _default_eps(input) if eps is None else eps, None, subtract_mean
            )
            return output
        except (RuntimeError, TypeError, ValueError) as error:
            refusal = error
    # A named tuple takes longer to build than all checks above.
    call = LayerNormCall(
        name, input, normalized_shape, weight, bias, eps, residual, scale, shift, scale_offset, subtract_mean
    )
    if refusal is None:
        return _run_checked(call)
    check_layer_norm(call)
    raise refusal


def _dims_of_operator(
    input: Tensor,
    normalized_shape: tuple[int, ...] | None,
    weight: Any,
    bias: Any,
    subtract_mean: bool,
) -> tuple[int, int] | None:
    """The first and the last normalized dimension, if the operator accepts these arguments without a change.

    It checks the shapes of parameters, but not ``normalized_shape``, and also accepts parameters of each sample.
    """
    if normalized_shape is None:
        count, start, end = 1, 1, 1
        fits = input.dim() > 2
    else:
        count, end = len(normalized_shape), input.dim() - 1
        start = end + 1 - count
        fits = count > 0 and start >= 0 and input.shape[start:] == normalized_shape
    for parameter in (weight, bias):
        fits = fits and (parameter is None or (isinstance(parameter, Tensor) and parameter.dim() == count))
    return (start, end) if fits and _promoted(weight, input.dtype, subtract_mean) is weight else None


def _promoted(weight: Any, dtype: torch.dtype, subtract_mean: bool) -> Any:
    """The weight. torch's RMS norm accepts one of any floating dtype, and its result has the dtype of ``input``."""
    if subtract_mean or not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype == dtype:
        return weight
    return weight.to(torch.promote_types(dtype, torch.float32))  # itself if it is float32 and dtype has 16 bits


def _run_checked(call: LayerNormCall) -> Any:
    """The call in all cases but the fast one."""
    if isinstance(call.input, Tensor) and call.input.is_floating_point():
        if is_autocast(call.input):
            call = in_float32(call)
        call = call._replace(weight=_promoted(call.weight, call.input.dtype, call.subtract_mean))
    residual = call.residual
    if residual is not None:
        check_residual(call.input, residual, call.name)
        if residual.dtype != call.input.dtype:  # the sum has the wider dtype, and is what is normalized
            total = call.input + residual
            return _run_checked(call._replace(input=total, residual=None)), total
    check_layer_norm(call)
    input, residual = call.input, call.residual
    weight, bias = modulated_parameters(input.dtype, call.weight, call.bias, call.scale, call.shift, call.scale_offset)
    eps = _default_eps(input) if call.eps is None else call.eps
    arguments = (input, *call.dims, weight, bias, eps, residual, call.subtract_mean)
    if needs_torchs_operators(torch.compiler.is_compiling()):
        output, total = decompositions.layer_norm(*arguments)
    elif _extension.C is None:
        output, total = reference.layer_norm_with_sum(*arguments)
    else:
        output, total = torch.ops.normfused.layer_norm(*arguments)[:2]
    return output if residual is None else (output, total)


def _default_eps(input: Tensor) -> float:
    return torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps


def check_layer_norm(call: LayerNormCall) -> None:
    """Raise ``TypeError`` or ``ValueError`` for invalid arguments of layer norm and RMS norm."""
    name, input, normalized_shape = call.name, call.input, call.normalized_shape
    check_input(name, input, 1 if normalized_shape is not None else 3)
    if normalized_shape is not None:
        if not normalized_shape:
            raise ValueError(f"{name}: normalized_shape must have at least one dimension, got ()")
        if tuple(input.shape[-len(normalized_shape) :]) != normalized_shape:
            raise ValueError(
                f"{name}: normalized_shape must be the last dimensions of input of shape {tuple(input.shape)}, "
                f"got {normalized_shape}"
            )
    shape = call.shape
    for argument in ("weight", "bias"):
        check_parameter(name, argument, getattr(call, argument), input, shape)
    for argument in ("scale", "shift"):
        value = getattr(call, argument)
        if value is not None and call.dims[0] == 0:
            raise ValueError(f"{name}: {argument} needs an input with a dimension of samples before {shape}")
        check_parameter(name, argument, value, input, (input.size(0), *shape))
    if call.eps is not None:
        check_number(name, "eps", call.eps, least=0)
    check_number(name, "scale_offset", call.scale_offset)
