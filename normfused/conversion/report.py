"""The report of a conversion, and the bytes that a forward pass saves for backward."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class ConversionReport:
    """What :func:`normfused.convert` did to a model. ``print(report)`` shows a table.

    ``replaced`` and ``skipped`` are complete after the conversion. ``fused`` and ``unfused`` grow while the model runs:
    they contain the norms that have been captured so far, each as in its last capture.

    Attributes:
        fuse, inplace: the arguments of ``convert``.
        unavailable_reason: why nothing can be fused in this process; None if calls can be captured.
        replaced: (path of the layer, name of its class before) of each replaced layer.
        skipped: (paths of layers, reason) for each reason.
        fused: for each path the operations that run in the same pass.
        unfused: for each path the reason why no operation does.
        graphs: number of captured graphs.
        eager_reason: why the last call was not captured; None if it was.
        limit_reached: the limit of graphs per module, once a module has reached it. Its other calls run uncompiled.
        bytes_before, bytes_after: bytes saved for backward with the example inputs; None without them.

    Example:
        >>> import normfused
        >>> from torch import nn
        >>> model = normfused.convert(nn.Sequential(nn.BatchNorm2d(8)), fuse=False)
        >>> print(normfused.conversion_report(model))
        1 norm replaced, 0 fused
          replaced  0  torch.nn.BatchNorm2d
    """

    fuse: bool = True
    inplace: bool = False
    unavailable_reason: str | None = None
    replaced: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    fused: dict[str, str] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)
    graphs: int = 0
    eager_reason: str | None = None
    limit_reached: int | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None

    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Path and module of each norm of this package in ``model``."""
        from normfused.conversion.classes import is_ours

        return ((path, layer) for path, layer in model.named_modules() if is_ours(layer))

    def record(self, outcomes: dict[str, tuple[str, bool]]) -> None:
        """Record one capture: for each path the fused operations and True, or the reason against it and False."""
        self.graphs += 1
        for path, (text, is_fused) in outcomes.items():
            (self.unfused if is_fused else self.fused).pop(path, None)
            (self.fused if is_fused else self.unfused)[path] = text

    def warn_of_limit(self, limit: int) -> None:
        """Record that calls which need another graph are no longer captured. Warns the first time."""
        if self.limit_reached is None:
            self.limit_reached = limit
            warnings.warn(
                f"normfused.convert: a module has {limit} captured graphs, the limit; calls that need another graph "
                "run without fusion. TORCH_LOGS=recompiles shows how they differ",
                RuntimeWarning,
                stacklevel=4,
            )

    @property
    def pending(self) -> list[str]:
        """The paths of replaced layers that no graph contains so far."""
        return [path for path, _ in self.replaced if path not in self.fused and path not in self.unfused]

    def __str__(self) -> str:
        counts = f"{_count(len(self.replaced), 'norm')} replaced, {len(self.fused)} fused"
        lines = [f"{counts}, {_count(len(self.skipped), 'kind')} skipped" if self.skipped else counts]
        if self.fuse and self.unavailable_reason is not None:
            lines.append(f"nothing is fused: {self.unavailable_reason}")
        elif self.fuse and self.pending and not self.graphs and self.eager_reason is not None:
            lines.append(f"nothing is fused so far: calls {self.eager_reason} are not captured")
        elif self.fuse and self.pending and not self.graphs:
            lines.append("fusions are known after the first call, or with example_inputs")
        elif self.fuse and self.pending:
            lines.append(f"{len(self.pending)} not captured so far: {', '.join(self.pending[:8])}")
        if self.limit_reached is not None:
            lines.append(f"a module has reached the limit of {self.limit_reached} graphs: other calls are not fused")
        classes = dict(self.replaced)
        rows = []
        for path, kind in classes.items():
            if path in self.fused:
                rows.append(("fused", path, f"{kind} + {self.fused[path]}"))
            else:
                rows.append(("replaced", path, kind + (f": {self.unfused[path]}" if path in self.unfused else "")))
        rows += [("fused", path, what) for path, what in self.fused.items() if path not in classes]
        rows += [("skipped", path, why) for path, why in self.skipped]
        rows = [(kind, path or "(model)", what) for kind, path, what in rows]
        width = max((len(path) for _, path, _ in rows), default=0)
        lines += [f"  {kind:8}  {path:{width}}  {what}" for kind, path, what in rows]
        if self.bytes_before is not None and self.bytes_after is not None:
            share = 1 - self.bytes_after / max(self.bytes_before, 1)
            lines.append(
                f"saved for backward: {self.bytes_before / 2**20:.1f} MiB before, "
                f"{self.bytes_after / 2**20:.1f} MiB after ({abs(share):.0%} {'less' if share > 0 else 'more'})"
            )
        return "\n".join(lines)


def _count(n: int, unit: str) -> str:
    return f"{n} {unit}" if n == 1 else f"{n} {unit}s"


_reports: weakref.WeakKeyDictionary[nn.Module, ConversionReport] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, report: ConversionReport) -> None:
    """Let :func:`conversion_report` find ``report``."""
    _reports[model] = report


def forget(model: nn.Module) -> None:
    """Undo :func:`remember`."""
    _reports.pop(model, None)


def conversion_report(model: nn.Module) -> ConversionReport:
    """The report of :func:`normfused.convert` for ``model``, including the fusions in its calls so far.

    Args:
        model: the module that ``convert`` was called with.

    Raises:
        ValueError: ``convert`` was not called with this module. Copies of a converted model and models loaded from a
            file fuse nothing, and have no report, until they are converted themselves.

    Example:
        >>> import normfused
        >>> from torch import nn
        >>> model = normfused.convert(nn.Sequential(nn.BatchNorm2d(8)), fuse=False)
        >>> normfused.conversion_report(model).replaced
        [('0', 'torch.nn.BatchNorm2d')]
    """
    report = _reports.get(model)
    if report is None:
        raise ValueError(
            f"conversion_report: this {type(model).__name__} has not been converted; after copying or loading a "
            "model, call normfused.convert again"
        )
    return report


def shorten(paths: list[str]) -> str:
    """``"a, b and 10 more"``."""
    return ", ".join(paths[:2]) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "")


def by_class(skipped: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each reason once, with the paths of its layers."""
    counts = Counter(why for _, why in skipped)
    return [(shorten([path for path, reason in skipped if reason == why]), why) for why in counts]


def bytes_saved_for_backward(model: nn.Module, *inputs: Any) -> int:
    """Bytes that a forward pass of ``model`` saves for backward, without its parameters and buffers.

    It runs the pass, which updates running statistics if the model is in training mode.

    Example:
        >>> import torch, normfused
        >>> from normfused.conversion import bytes_saved_for_backward
        >>> x = torch.randn(2, 3, 4, 4)  # 384 bytes
        >>> 384 <= bytes_saved_for_backward(normfused.BatchNorm2d(3), x) < 600
        True
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)  # keeps the saved tensors alive, so that no address is counted twice
    del output
    return sum(saved.values())
