"""Layers that normalize the last dimensions or the channels of each position: layer norm and RMS norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normfused.layer_norms import run_layer_norm
from normfused.layer_tensors import RegisteredTensors, parameter_of
from normfused.scripting import scriptable

__all__ = ["LayerNorm", "LayerNorm2d", "RMSNorm", "RMSNorm2d"]

_Device = torch.device | str | int | None


class _LayerNorm(RegisteredTensors):
    """The forward pass. Parameters and ``state_dict`` are those of torch.nn's layers."""

    if TYPE_CHECKING:
        normalized_shape: tuple[int, ...]
        eps: Any
        weight: Any
        bias: Any
        elementwise_affine: bool
    scale_offset: float = 0.0
    _subtract_mean = True

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Any:
        """Normalize ``input``; see the class."""
        weight = parameter_of(self, "weight")
        bias = parameter_of(self, "bias") if self._subtract_mean else None
        return run_layer_norm(
            type(self).__name__, input, self._shape_of(input), weight, bias, self.eps, residual, scale, shift,
            0.0 if weight is None else self.scale_offset, self._subtract_mean,
        )  # fmt: skip

    def _shape_of(self, input: Tensor) -> tuple[int, ...] | None:
        return self.normalized_shape

    def _set_scale_offset(self, scale_offset: float) -> None:
        self.scale_offset = float(scale_offset)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight so that ``weight + scale_offset`` is 1, and the bias to 0."""
        super().reset_parameters()  # type: ignore[misc]
        if self.scale_offset and self.weight is not None:
            nn.init.constant_(self.weight, 1 - self.scale_offset)

    def extra_repr(self) -> str:
        """As torch.nn's layers, and ``scale_offset`` if it is not 0."""
        text: str = super().extra_repr()  # type: ignore[misc]
        return f"{text}, scale_offset={self.scale_offset:g}" if self.scale_offset else text

    def __prepare_scriptable__(self) -> nn.Module:
        """The torch.nn layer that ``torch.jit.script`` compiles in place of this one."""
        return scriptable(self, {"scale_offset": self.scale_offset} if self.scale_offset else {})


class LayerNorm(_LayerNorm, nn.LayerNorm):
    """Layer norm over the last dimensions; a subclass of and drop-in for :class:`torch.nn.LayerNorm`.

    The arithmetic, the errors of a call, and the promise about batches are those of
    :func:`normfused.functional.layer_norm`.

    Args:
        normalized_shape: an int or the sizes of the dimensions that are normalized together.
        eps: added to the variance.
        elementwise_affine: whether the layer has ``weight`` and ``bias``, of shape ``normalized_shape``.
        bias: whether the layer has ``bias`` if ``elementwise_affine``.
        device, dtype: of the parameters; default torch's.
        scale_offset: the output is multiplied by ``weight + scale_offset``; 1 for weights that are stored as their
            difference from 1. The weight is initialized to ``1 - scale_offset``.

    Call:
        ``layer(input, residual=None, *, scale=None, shift=None)`` with ``scale`` and ``shift`` of shape
        ``(N, *normalized_shape)``. With ``residual`` it returns the norm of ``input + residual``, and the sum.

    Example:
        >>> import torch, normfused
        >>> layer = normfused.LayerNorm(8)
        >>> x = torch.randn(2, 5, 8)
        >>> layer(x).shape
        torch.Size([2, 5, 8])
        >>> y, x = layer(torch.randn(2, 5, 8), residual=x)  # the residual stream of a transformer

    Source: Ba, Kiros and Hinton, 2016, arXiv:1607.06450;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LayerNorm.html
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        scale_offset: float = 0.0,
    ) -> None:
        nn.LayerNorm.__init__(self, normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._set_scale_offset(scale_offset)


class RMSNorm(_LayerNorm, nn.RMSNorm):
    """RMS norm over the last dimensions; a subclass of and drop-in for :class:`torch.nn.RMSNorm`.

    Args:
        normalized_shape: an int or the sizes of the dimensions that are normalized together.
        eps: added to the mean square; default: see :func:`normfused.functional.rms_norm`.
        elementwise_affine: whether the layer has ``weight``, of shape ``normalized_shape``.
        device, dtype: of the parameter; default torch's.
        scale_offset: as in :class:`LayerNorm`; 1 for the weights of Gemma.

    Call:
        ``layer(input, residual=None, *, scale=None, shift=None)``, as :class:`LayerNorm`.

    Example:
        >>> import torch, normfused
        >>> normfused.RMSNorm(8, eps=1e-6)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])

    Source: Zhang and Sennrich, 2019, arXiv:1910.07467;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RMSNorm.html
    """

    _subtract_mean = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        scale_offset: float = 0.0,
    ) -> None:
        nn.RMSNorm.__init__(self, normalized_shape, eps, elementwise_affine, device, dtype)
        self._set_scale_offset(scale_offset)


class _ChannelNorm(_LayerNorm):
    """Over dimension 1, in the input's memory layout."""

    def _shape_of(self, input: Tensor) -> tuple[int, ...] | None:
        (channels,) = self.normalized_shape
        if isinstance(input, Tensor) and input.dim() > 2 and input.size(1) != channels:
            raise ValueError(
                f"{type(self).__name__}: expected input of shape (N, {channels}, ...), got {tuple(input.shape)}"
            )
        return None

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise ``RuntimeError``: ``torch.jit.script`` does not support this layer."""
        raise RuntimeError(f"torch.jit.script cannot compile {type(self).__name__}; call normfused.revert first")


class LayerNorm2d(_ChannelNorm, LayerNorm):
    """Layer norm over the channels of each position of ``(N, C, H, W)``, in any memory format.

    A drop-in for timm's and torchvision's layers of this name, which move the channels last and back. ``state_dict`` is
    that of :class:`torch.nn.LayerNorm`, from which the class derives.

    Args:
        num_channels: number of channels ``C``.
        eps: added to the variance; default 1e-6, as in timm.
        affine: whether the layer has ``weight`` and ``bias``, of shape ``(C,)``.
        bias: whether the layer has ``bias`` if ``affine``.
        device, dtype: of the parameters; default torch's.
        scale_offset: as in :class:`LayerNorm`.

    Call:
        ``layer(input, residual=None, *, scale=None, shift=None)`` with ``scale`` and ``shift`` of shape ``(N, C)``; as
        :class:`LayerNorm`. Any number of spatial dimensions from 1 on.

    Raises:
        ValueError: an input with another number of channels.

    Example:
        >>> import torch, normfused
        >>> normfused.LayerNorm2d(96)(torch.randn(2, 96, 7, 7)).shape
        torch.Size([2, 96, 7, 7])

    Source: Liu et al., 2022, arXiv:2201.03545.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        affine: bool = True,
        bias: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        scale_offset: float = 0.0,
    ) -> None:
        super().__init__(num_channels, eps, affine, bias, device, dtype, scale_offset=scale_offset)


class RMSNorm2d(_ChannelNorm, RMSNorm):
    """RMS norm over the channels of each position of ``(N, C, H, W)``, in any memory format.

    Args:
        num_channels, device, dtype, scale_offset: as in :class:`LayerNorm2d`.
        eps: added to the mean square; default 1e-6, as in timm.
        affine: whether the layer has ``weight``, of shape ``(C,)``.

    Call:
        ``layer(input, residual=None, *, scale=None, shift=None)``, as :class:`LayerNorm2d`.

    Example:
        >>> import torch, normfused
        >>> normfused.RMSNorm2d(96)(torch.randn(2, 96, 7, 7)).shape
        torch.Size([2, 96, 7, 7])
    """

    def __init__(
        self,
        num_channels: int,
        eps: float | None = 1e-6,
        affine: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        scale_offset: float = 0.0,
    ) -> None:
        super().__init__(num_channels, eps, affine, device, dtype, scale_offset=scale_offset)
