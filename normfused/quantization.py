"""What ``torch.ao.quantization`` has to know of our layers, which it looks up by their exact class.

Layers without an option of ours are quantized and fused as torch.nn's, which they become for that. ``fuse_modules`` and
``convert`` find them in the tables of torch, ``prepare_fx`` and ``prepare_qat_fx`` when they trace the model
(:func:`normfused.batch_norm_base.to_torch_class`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from normfused._torch_private import quantization_tables
from normfused.batch_norm_base import behavioral_options, to_torch_class
from normfused.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

_OURS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}


def _of_ours(method: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's method that fuses layers, for layers of ours."""

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
            fusers[ours] = _of_ours(method)
    for stock, mine in _OURS.items():
        if stock in static:
            static[mine] = static[stock]


_register()
