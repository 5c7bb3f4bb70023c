"""``DistributedDataParallel`` accepts the package's synchronized layers on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from normfused import _torch_private

_admitted: list[type] = []


def admit(kind: type) -> None:
    """Exempt layers of this class from the check by which ``DistributedDataParallel`` rejects SyncBatchNorm on the CPU.

    It rejects all subclasses of torch.nn.SyncBatchNorm there, because torch.nn.SyncBatchNorm runs on CUDA only. The
    first call patches the check. Layers call this when they are made, so that importing the package patches nothing.
    """
    if not _admitted:
        _torch_private.patch_ddp_check(_without_admitted)
    if kind not in _admitted:
        _admitted.append(kind)


def _without_admitted(check: Callable[..., Any]) -> Callable[..., Any]:
    def check_others(ddp: Any, module: Any) -> None:
        others = [layer for layer in module.modules() if not isinstance(layer, tuple(_admitted))]
        check(ddp, SimpleNamespace(modules=lambda: others))

    return check_others
