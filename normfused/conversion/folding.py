"""Folding of a batch norm into the linear layer or convolution before it."""

from __future__ import annotations

import copy
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normfused import modules
from normfused.batch_norm_base import _BatchNorm
from normfused.checks import DTYPES
from normfused.distributed.layers import SyncBatchNorm, SyncBatchNormAct

__all__ = ["fold_bn"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Exact types and the number of dimensions of their outputs. A subclass may compute something else.
_PREVIOUS: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}
# Exact types and the numbers of dimensions that they accept.
_BATCH_NORMS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
    modules.BatchNorm1d: (2, 3),
    modules.BatchNorm2d: (4,),
    modules.BatchNorm3d: (5,),
    modules.BatchNormAct1d: (2, 3),
    modules.BatchNormAct2d: (4,),
    modules.BatchNormAct3d: (5,),
    SyncBatchNorm: (2, 3, 4, 5),
    SyncBatchNormAct: (2, 3, 4, 5),
}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

_Folded = TypeVar("_Folded", bound=nn.Module)


@torch.no_grad()
def fold_bn(previous: _Folded, bn: nn.Module) -> _Folded:
    """Return a copy of ``previous`` that computes ``bn(previous(x))`` in evaluation mode.

    Neither argument is changed, so both may be shared with other parts of a model.

    Args:
        previous: an ``nn.Linear``, ``nn.Conv1d/2d/3d`` or ``nn.ConvTranspose1d/2d/3d``, not a subclass, with any
            groups, with or without bias. Inputs of a ``Linear`` must have shape ``(N, in_features)``, and those of a
            ``Conv1d`` a batch dimension; for other inputs ``BatchNorm1d`` normalizes another dimension.
        bn: a batch norm of ``torch.nn`` or normfused, synchronized or not, not a subclass. It must accept the outputs
            of ``previous``, be in evaluation mode, and have running statistics and no activation.

    Returns:
        A new module with a bias, in the dtype of ``previous.weight``. The arithmetic is in float32 or wider.

    Raises:
        TypeError: a module of another type; a tensor that is not a plain, real, floating-point tensor.
        ValueError: ``bn`` is in training mode, has no running statistics, has an activation, or another number of
            channels; a module has hooks, parametrizations, pruning masks or its own ``forward``, which a copy of the
            weights would lose; tensors on the meta device or on several devices; a folded value that is not finite in
            the dtype of ``previous.weight``.

    Example:
        >>> import torch, normfused
        >>> conv, bn = torch.nn.Conv2d(3, 8, 3), normfused.BatchNorm2d(8).eval()
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.allclose(normfused.fold_bn(conv, bn)(x), bn(conv(x)), atol=1e-5)
        True
    """
    _check_modules(previous, bn)
    tensors = _tensors(previous, bn)
    _check_tensors(tensors)
    weight, bias = _folded(previous, bn, tensors)
    for name, values in (("weight", weight), ("bias", bias)):
        if not values.isfinite().all():
            raise ValueError(f"fold_bn: the folded {name} has values that are not finite in {values.dtype}")
    folded: Any = copy.deepcopy(previous)
    learns = tensors["previous.weight"].requires_grad
    folded.weight, folded.bias = nn.Parameter(weight, learns), nn.Parameter(bias, learns)
    return folded  # type: ignore[no-any-return]


def _check_modules(previous: nn.Module, bn: nn.Module) -> None:
    for name, module, types, needs in (
        ("previous", previous, _PREVIOUS, "exactly a Linear, Conv or ConvTranspose of torch.nn"),
        ("bn", bn, _BATCH_NORMS, "exactly a batch norm of torch.nn or normfused"),
    ):
        if isinstance(module, nn.Module) and parametrize.is_parametrized(module):
            raise ValueError(
                f"fold_bn: {name} has parametrizations; call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if type(module) not in types:
            raise TypeError(f"fold_bn: {name} must be {needs}, got {_name_of(module)}")
        hooks = [_name_of(hook) for kind in _HOOKS for hook in getattr(module, kind).values()]
        if hooks:
            raise ValueError(
                f"fold_bn: {name} has hooks, which folding would lose: {', '.join(hooks)}; remove them first "
                "(torch.nn.utils.remove_weight_norm, remove_spectral_norm, prune.remove)"
            )
        if "forward" in vars(module):
            raise ValueError(f"fold_bn: {name} has its own forward, which folding would lose")
    if bn.training:
        raise ValueError("fold_bn: bn is in training mode, in which it depends on the batch; call eval() first")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("fold_bn: bn has no running statistics")
    if getattr(bn, "activation", None) not in (None, "identity"):
        raise ValueError(f"fold_bn: bn has an activation, {bn.activation!r}, which cannot be folded")
    if _PREVIOUS[type(previous)] not in _BATCH_NORMS[type(bn)]:
        raise ValueError(
            f"fold_bn: bn is {_name_of(bn)}, which does not accept the {_PREVIOUS[type(previous)]}D "
            f"output of {_name_of(previous)}"
        )


def _name_of(what: object) -> str:
    kind = what if isinstance(what, FunctionType) else type(what)
    return kind.__qualname__


def _tensors(previous: nn.Module, bn: nn.Module) -> dict[str, Tensor]:
    """The tensors of both modules that are not None, by name."""
    found = {f"previous.{name}": getattr(previous, name) for name in ("weight", "bias")}
    found |= {f"bn.{name}": getattr(bn, name) for name in ("running_mean", "running_var", "weight", "bias")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    device = tensors["previous.weight"].device
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            raise TypeError(f"fold_bn: {name} must be a plain tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"fold_bn: {name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
        if tensor.device.type == "meta":
            raise ValueError(f"fold_bn: {name} is on the meta device, which has no values")
        if tensor.device != device:
            raise ValueError(f"fold_bn: {name} is on {tensor.device}, but previous.weight is on {device}")


def _folded(previous: Any, bn: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the folded layer, in the dtype of ``previous.weight``."""
    weight = tensors["previous.weight"]
    transposed = isinstance(previous, _TRANSPOSED)  # (in, out / groups, ...)
    channels = weight.size(1) * previous.groups if transposed else weight.size(0)
    result_dtype = weight.dtype
    dtype = torch.float32
    for name, tensor in tensors.items():
        if name.startswith("bn.") and tensor.shape != (channels,):
            shape = tuple(tensor.shape)
            raise ValueError(f"fold_bn: {name} has shape {shape}, but previous has {channels} output channels")
        dtype = torch.promote_types(dtype, tensor.dtype)
    of = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    eps = bn.epsilon if isinstance(bn, _BatchNorm) else bn.eps
    scale = (of["bn.running_var"] + eps).rsqrt()
    if "bn.weight" in of:
        scale = scale * of["bn.weight"]
    bias = (of["previous.bias"] - of["bn.running_mean"] if "previous.bias" in of else -of["bn.running_mean"]) * scale
    if "bn.bias" in of:
        bias = bias + of["bn.bias"]
    weight = of["previous.weight"]
    ones = [1] * (weight.dim() - 2)
    if transposed:  # the first dimension holds the inputs of all groups, one group after another
        by_group = weight.view(previous.groups, -1, *weight.shape[1:]) * scale.view(previous.groups, 1, -1, *ones)
        weight = by_group.flatten(0, 1)
    else:
        weight = weight * scale.view(-1, 1, *ones)
    return weight.to(result_dtype), bias.to(result_dtype)
