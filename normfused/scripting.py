"""The torch.nn layers that ``torch.jit.script`` compiles in place of this package's, with the same parameters.

``torch.jit.script`` calls ``__prepare_scriptable__`` of each module and replaces the module in the model by the result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, Optional
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from normfused._torch_private import BatchNormBase
from normfused.activations import ACTIVATION_PARAMS

_MODULES: dict[str, Callable[[float], nn.Module]] = {
    "identity": lambda _: nn.Identity(),
    "relu": lambda _: nn.ReLU(),
    "relu6": lambda _: nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "hardswish": lambda _: nn.Hardswish(),
    "sigmoid": lambda _: nn.Sigmoid(),
    "tanh": lambda _: nn.Tanh(),
    "silu": lambda _: nn.SiLU(),
    "gelu": lambda _: nn.GELU(),
    "gelu_tanh": lambda _: nn.GELU("tanh"),
}


def _named(name: str, function: Any) -> Any:
    """A copy of ``function`` with another name: TorchScript compiles a method under the name of its function."""
    copied = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copied.__annotations__ = function.__annotations__
    return copied


class _BatchNormAct(BatchNormBase):
    """Batch norm, addition and activation by torch.nn's layers. ``state_dict`` has only the keys of the batch norm."""

    if TYPE_CHECKING:  # hidden from TorchScript, which reads annotations
        follow: Any
    _normalize = _named("_normalize", BatchNormBase.forward)

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:  # noqa: UP045 (TorchScript reads it)
        output = self._normalize(input)
        if residual is not None:
            output = output + residual
        return self.follow(output)  # type: ignore[no-any-return]


class _BatchNormAct1d(_BatchNormAct):
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class _BatchNormAct2d(_BatchNormAct):
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class _BatchNormAct3d(_BatchNormAct):
    _check_input_dim = nn.BatchNorm3d._check_input_dim


_SCRIPTABLE: dict[str, type[nn.Module]] = {
    "BatchNorm1d": nn.BatchNorm1d,
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNorm3d": nn.BatchNorm3d,
    "BatchNormAct1d": _BatchNormAct1d,
    "BatchNormAct2d": _BatchNormAct2d,
    "BatchNormAct3d": _BatchNormAct3d,
    "GroupNorm": nn.GroupNorm,
    "InstanceNorm1d": nn.InstanceNorm1d,
    "InstanceNorm2d": nn.InstanceNorm2d,
    "InstanceNorm3d": nn.InstanceNorm3d,
    "LayerNorm": nn.LayerNorm,
    "LocalResponseNorm": nn.LocalResponseNorm,
    "RMSNorm": nn.RMSNorm,
}


# torch.jit.script stores the id() of each module that it has seen, and drops modules that it replaces. A new module at
# the same address would be confused with the dropped one. So a replaced layer is kept alive by its replacement.
_REPLACED: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def scriptable(layer: Any, options: dict[str, Any]) -> nn.Module:
    """The torch.nn layer for ``torch.jit.script``, with the same parameters, buffers and hooks.

    Raises:
        RuntimeError: a layer of another class, or one with ``options`` that TorchScript would lose.
    """
    name = type(layer).__name__
    cls = _SCRIPTABLE.get(name) if type(layer).__module__.startswith("normfused.") else None
    if cls is None:
        raise RuntimeError(f"torch.jit.script cannot compile {name}; call normfused.revert first")
    lost = ", ".join(f"{option}={value!r}" for option, value in options.items() if not option.startswith("activation"))
    if lost:
        raise RuntimeError(f"torch.jit.script would lose {lost} of {name}; reset it on a copy of the model first")
    twin = copy.copy(layer)
    twin.__class__ = cls
    if issubclass(cls, _BatchNormAct):
        activation, parameter = layer.activation or "identity", layer.activation_param
        if parameter is None:
            parameter = ACTIVATION_PARAMS.get(activation, 0.0)
        twin._modules = {"follow": _MODULES[activation](parameter)}
    _REPLACED[twin] = layer
    return twin  # type: ignore[no-any-return]
