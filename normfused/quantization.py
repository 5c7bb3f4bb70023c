"""Registration of the layers with ``torch.ao.quantization``, which looks layers up by their exact class.

Importing this module, as ``import normfused`` does, adds the layers to torch's tables. Layers without an option that
torch.nn lacks are then quantized and fused like torch.nn's, and become torch.nn's layers in the process.
``fuse_modules`` and ``convert`` find them in the tables; ``prepare_fx`` and ``prepare_qat_fx`` change their class when
they trace the model. Layers with such an option raise ``ValueError``.

Example:
    >>> import torch, normfused
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), normfused.BatchNorm2d(8)).eval()
    >>> fused = torch.ao.quantization.fuse_modules(model, ["0", "1"])
    >>> type(fused[1]).__name__
    'Identity'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from normfused._torch_private import quantization_tables
from normfused.batch_norm_base import behavioral_options, to_torch_class
from normfused.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

_OURS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}


def _for_normfused(method: Callable[..., Any]) -> Callable[..., Any]:
    """A fuser method of torch, extended to layers of this package."""

    def fuse(is_qat: bool, *layers: nn.Module) -> Any:
        for layer in layers:
            if type(layer) in _OURS.values() and not to_torch_class(layer):
                lost = ", ".join(f"{option}={value!r}" for option, value in behavioral_options(layer).items())
                raise ValueError(f"torch's fusion would lose {lost} of {type(layer).__name__}; use normfused.fold_bn")
        return method(is_qat, *layers)

    return fuse


def _register() -> None:
    tables = quantization_tables()
    if tables is None:
        return
    fusers, static = tables
    for kinds, method in list(fusers.items()):
        ours = tuple(_OURS.get(kind, kind) for kind in kinds)
        if ours != kinds:
            fusers[ours] = _for_normfused(method)
    for stock, mine in _OURS.items():
        if stock in static:
            static[mine] = static[stock]


_register()
