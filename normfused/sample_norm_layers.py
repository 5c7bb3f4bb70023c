"""Layers whose statistics are those of one sample: group norm and instance norm, and both with an activation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normfused.activations import ACTIVATION_PARAMS
from normfused.arguments import check_activation
from normfused.layer_tensors import RegisteredTensors, buffer_of, parameter_of
from normfused.sample_norms import run_group_norm, run_instance_norm_layer
from normfused.scripting import scriptable

__all__ = [
    "GroupNorm",
    "GroupNormAct",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "InstanceNormAct1d",
    "InstanceNormAct2d",
    "InstanceNormAct3d",
]

_Device = torch.device | str | int | None


def _check_layer_activation(name: str, activation: str | None, parameter: float | None) -> str | None:
    """The activation, None for none. Raises ``ValueError`` unless it is known and has such a parameter."""
    kind = "identity" if activation is None else activation
    check_activation(name, kind, 0.0 if parameter is None else parameter)
    if parameter is not None and kind not in ACTIVATION_PARAMS:
        kinds = " and ".join(ACTIVATION_PARAMS)
        raise ValueError(f"{name}: activation_param applies to {kinds} only, got it for {activation!r}")
    return None if kind == "identity" else kind


def _activation_repr(layer: Any) -> str:
    parameter = "" if layer.activation_param is None else f", activation_param={layer.activation_param}"
    return f"activation={layer.activation or 'identity'}{parameter}"


class _GroupNorm(RegisteredTensors):
    """The forward pass. Parameters and ``state_dict`` are those of :class:`torch.nn.GroupNorm`."""

    if TYPE_CHECKING:
        num_groups: int
        eps: float
        weight: Any
        bias: Any
    activation: str | None = None
    activation_param: float | None = None

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Normalize ``input`` of shape ``(N, C, ...)``; see the class."""
        return run_group_norm(
            type(self).__name__, input, self.num_groups, parameter_of(self, "weight"), parameter_of(self, "bias"),
            self.eps, residual, self.activation, self.activation_param, scale, shift,
        )  # fmt: skip


def _init_group_norm(
    layer: Any, num_groups: int, num_channels: int, eps: float, affine: bool, device: _Device, dtype: Any, bias: bool
) -> None:
    if num_groups < 1:  # torch.nn divides by it
        raise ValueError(f"{type(layer).__name__}: num_groups must be at least 1, got {num_groups}")
    nn.GroupNorm.__init__(layer, num_groups, num_channels, eps, affine, device, dtype)
    if affine and not bias:  # an argument of torch.nn since 2.13
        layer.register_parameter("bias", None)


class GroupNorm(_GroupNorm, nn.GroupNorm):
    """Group norm over ``(N, C, ...)``; a subclass of and drop-in for :class:`torch.nn.GroupNorm`.

    The arithmetic, the errors of a call, and the promise about batches are those of
    :func:`normfused.functional.group_norm`. For an activation in the same pass over memory see :class:`GroupNormAct`.

    Args:
        num_groups: number of groups, which divides ``num_channels``.
        num_channels: number of channels ``C``.
        eps: added to the variance.
        affine: whether the layer has ``weight`` and ``bias``, of shape ``(C,)``.
        device, dtype: of the parameters; default torch's.
        bias: whether the layer has ``bias`` if ``affine``.

    Call:
        ``layer(input, residual=None, *, scale=None, shift=None)``

    Raises:
        ValueError: ``num_channels`` that ``num_groups`` does not divide.

    Example:
        >>> import torch, normfused
        >>> layer = normfused.GroupNorm(2, 6)
        >>> layer(torch.randn(4, 6, 8, 8), scale=torch.zeros(4, 6), shift=torch.ones(4, 6)).shape
        torch.Size([4, 6, 8, 8])

    Source: Wu and He, 2018, arXiv:1803.08494; https://docs.pytorch.org/docs/stable/generated/torch.nn.GroupNorm.html
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        _init_group_norm(self, num_groups, num_channels, eps, affine, device, dtype, bias)

    def __prepare_scriptable__(self) -> nn.Module:
        """The torch.nn layer that ``torch.jit.script`` compiles in place of this one."""
        return scriptable(self, {})


class GroupNormAct(_GroupNorm, nn.Module):
    """``activation(group_norm(input) + residual)`` in one pass over memory, for ``(N, C, ...)``.

    Parameters and ``state_dict`` are those of :class:`GroupNorm`. The class does not derive from
    :class:`torch.nn.GroupNorm`, because code that replaces such layers would lose the activation.

    Args:
        num_groups, num_channels: as in :class:`GroupNorm`.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"hardswish"``, ``"sigmoid"``, ``"tanh"``,
            ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, or ``"identity"``; ``None`` means ``"identity"``.
        activation_param: negative slope of leaky ReLU (default 0.01) or alpha of ELU (default 1).
        eps, affine, device, dtype, bias: as in :class:`GroupNorm`.

    Call:
        ``layer(input, residual=None, *, scale=None, shift=None)``, as :class:`GroupNorm`.

    Raises:
        ValueError: an unknown activation; ``activation_param`` for an activation without a parameter; and the cases of
            :class:`GroupNorm`.

    Example:
        >>> import torch, normfused
        >>> normfused.GroupNormAct(32, 64, "silu")(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    reset_parameters = nn.GroupNorm.reset_parameters

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        activation: str | None = "silu",
        activation_param: float | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        kind = _check_layer_activation(type(self).__name__, activation, activation_param)
        twin = GroupNorm(num_groups, num_channels, eps, affine, device, dtype, bias=bias)
        super().__init__()
        self.num_groups, self.num_channels, self.eps, self.affine = num_groups, num_channels, eps, affine
        self.register_parameter("weight", twin.weight)
        self.register_parameter("bias", twin.bias)
        self.activation, self.activation_param = kind, activation_param

    def extra_repr(self) -> str:
        """As :class:`torch.nn.GroupNorm`, and the activation."""
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"bias={self.bias is not None}, {_activation_repr(self)}"
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise ``RuntimeError``: ``torch.jit.script`` does not support this layer."""
        return scriptable(self, {})


class _InstanceNorm(RegisteredTensors):
    """The forward pass. Parameters and ``state_dict`` are those of torch.nn's layers."""

    if TYPE_CHECKING:
        num_features: int
        eps: float
        momentum: float | None
        affine: bool
        track_running_stats: bool
        training: bool
        weight: Any
        bias: Any
        running_mean: Tensor | None
        running_var: Tensor | None

        def _get_no_batch_dim(self) -> int: ...

    activation: str | None = None
    activation_param: float | None = None

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Normalize ``input``; see the class."""
        return run_instance_norm_layer(
            type(self).__name__, self._get_no_batch_dim(), self.num_features, self.affine, input,
            buffer_of(self, "running_mean"), buffer_of(self, "running_var"), parameter_of(self, "weight"),
            parameter_of(self, "bias"), self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum, self.eps, residual, self.activation,
            self.activation_param, scale, shift,
        )  # fmt: skip


class _PlainInstanceNorm(_InstanceNorm):
    def __init__(
        self,
        # torch.nn's parameters
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)  # type: ignore[call-arg]
        if affine and not bias:  # an argument of torch.nn since 2.13
            self.register_parameter("bias", None)  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> nn.Module:
        """The torch.nn layer that ``torch.jit.script`` compiles in place of this one."""
        return scriptable(self, {})


class InstanceNorm1d(_PlainInstanceNorm, nn.InstanceNorm1d):
    """Instance norm over ``(N, C, L)`` or ``(C, L)``; a subclass of and drop-in for :class:`torch.nn.InstanceNorm1d`.

    The arithmetic and the errors of a call are those of :func:`normfused.functional.instance_norm`. For an activation
    in the same pass over memory see :class:`InstanceNormAct1d`.

    Args:
        num_features: number of channels ``C``.
        eps: added to the variance.
        momentum: weight of the batch in the running statistics; ``None`` for 0.
        affine: whether the layer has ``weight`` and ``bias``, of shape ``(C,)``.
        track_running_stats: whether the layer has running statistics, with which it normalizes in evaluation.
        device, dtype: of parameters and buffers; default torch's.
        bias: whether the layer has ``bias`` if ``affine``.

    Call:
        ``layer(input, residual=None, *, scale=None, shift=None)`` with ``scale`` and ``shift`` of shape ``(N, C)``.

    Raises:
        ValueError: an input of another shape, and the cases of :func:`normfused.functional.instance_norm`.

    Warns:
        UserWarning: another number of channels without ``affine``, as torch.nn.

    Example:
        >>> import torch, normfused
        >>> normfused.InstanceNorm1d(3)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])

    Source: Ulyanov, Vedaldi and Lempitsky, 2016, arXiv:1607.08022;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.InstanceNorm1d.html
    """


class InstanceNorm2d(_PlainInstanceNorm, nn.InstanceNorm2d):
    """Instance norm over ``(N, C, H, W)`` or ``(C, H, W)``; a subclass of :class:`torch.nn.InstanceNorm2d`.

    Arguments, call and errors are those of :class:`InstanceNorm1d`.

    Example:
        >>> import torch, normfused
        >>> normfused.InstanceNorm2d(3, affine=True)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.InstanceNorm2d.html
    """


class InstanceNorm3d(_PlainInstanceNorm, nn.InstanceNorm3d):
    """Instance norm over ``(N, C, D, H, W)`` or ``(C, D, H, W)``; a subclass of :class:`torch.nn.InstanceNorm3d`.

    Arguments, call and errors are those of :class:`InstanceNorm1d`.

    Example:
        >>> import torch, normfused
        >>> normfused.InstanceNorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.InstanceNorm3d.html
    """


class _ActivationInstanceNorm(_InstanceNorm, nn.Module):
    _layer: type[Any]

    def __init__(
        self,
        # torch.nn's parameters in torch.nn's order, after the activation
        num_features: int,
        activation: str | None = "leaky_relu",
        activation_param: float | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        kind = _check_layer_activation(type(self).__name__, activation, activation_param)
        options = (eps, momentum, affine, track_running_stats)
        twin = self._layer(num_features, *options, device, dtype, bias=bias)
        super().__init__()
        self.num_features = num_features
        self.eps, self.momentum, self.affine, self.track_running_stats = options
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(twin, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(twin, name))
        self.activation, self.activation_param = kind, activation_param

    reset_running_stats = nn.InstanceNorm1d.reset_running_stats
    reset_parameters = nn.InstanceNorm1d.reset_parameters

    def _get_no_batch_dim(self) -> int:
        return self._layer._get_no_batch_dim(self)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """As torch.nn's layers, and the activation."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, {_activation_repr(self)}"
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise ``RuntimeError``: ``torch.jit.script`` does not support this layer."""
        return scriptable(self, {})


class InstanceNormAct1d(_ActivationInstanceNorm):
    """``activation(instance_norm(input) + residual)`` in one pass over memory, for ``(N, C, L)`` or ``(C, L)``.

    Parameters, buffers and ``state_dict`` are those of :class:`InstanceNorm1d`.

    Args:
        num_features: number of channels ``C``.
        activation, activation_param: as in :class:`GroupNormAct`; default leaky ReLU.
        eps, momentum, affine, track_running_stats, device, dtype, bias: as in :class:`InstanceNorm1d`.

    Call:
        ``layer(input, residual=None, *, scale=None, shift=None)``, as :class:`InstanceNorm1d`.

    Raises:
        ValueError: as :class:`GroupNormAct` and :class:`InstanceNorm1d`.

    Example:
        >>> import torch, normfused
        >>> normfused.InstanceNormAct1d(3, "relu")(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    _layer = InstanceNorm1d


class InstanceNormAct2d(_ActivationInstanceNorm):
    """``activation(instance_norm(input) + residual)`` in one pass, for ``(N, C, H, W)`` or ``(C, H, W)``.

    Arguments, call and errors are those of :class:`InstanceNormAct1d`.

    Example:
        >>> import torch, normfused
        >>> normfused.InstanceNormAct2d(3)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """

    _layer = InstanceNorm2d


class InstanceNormAct3d(_ActivationInstanceNorm):
    """``activation(instance_norm(input) + residual)`` in one pass, for ``(N, C, D, H, W)`` or ``(C, D, H, W)``.

    Arguments, call and errors are those of :class:`InstanceNormAct1d`.

    Example:
        >>> import torch, normfused
        >>> normfused.InstanceNormAct3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """

    _layer = InstanceNorm3d
