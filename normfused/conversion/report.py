"""What a conversion did, to be printed, and the bytes that a forward pass saves for backward."""

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
    """What :func:`normfused.convert` did to a model. ``print`` shows a table.

    ``replaced`` and ``skipped`` are known at once. ``fused`` and ``unfused`` grow as the model runs: they are about the
    batch norms that have been captured so far, in their last capture.
    """

    fuse: bool = True  # as requested
    inplace: bool = False  # as requested
    unavailable_reason: str | None = None  # why nothing can be fused in this process
    replaced: list[tuple[str, str]] = field(default_factory=list)  # path, the name of the class before
    skipped: list[tuple[str, str]] = field(default_factory=list)  # paths of one class of layers, why
    fused: dict[str, str] = field(default_factory=dict)  # path, what follows in the same pass
    unfused: dict[str, str] = field(default_factory=dict)  # path, why nothing does
    graphs: int = 0  # captured so far
    eager_reason: str | None = None  # why the last call was not captured
    limit_reached: int | None = None  # the number of graphs of one module beyond which calls run as they are
    bytes_before: int | None = None  # saved for backward, with the example inputs
    bytes_after: int | None = None

    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The batch norms of ours in ``model``, by path."""
        from normfused.conversion.classes import is_ours

        return ((path, layer) for path, layer in model.named_modules() if is_ours(layer))

    def record(self, outcomes: dict[str, tuple[str, bool]]) -> None:
        """Take down one capture: for each layer what follows it in the same pass, or why nothing does."""
        self.graphs += 1
        for path, (text, is_fused) in outcomes.items():
            (self.unfused if is_fused else self.fused).pop(path, None)
            (self.fused if is_fused else self.unfused)[path] = text

    def warn_of_limit(self, limit: int) -> None:
        """Take down, and warn once, that calls which need another graph are no longer captured."""
        if self.limit_reached is None:
            self.limit_reached = limit
            warnings.warn(
                f"normfused.convert: a module has been captured in {limit} ways; calls that differ from all of them "
                "run without fusion. TORCH_LOGS=recompiles says in what they differ",
                RuntimeWarning,
                stacklevel=4,
            )

    @property
    def pending(self) -> list[str]:
        """The paths of replaced layers that no graph has captured so far."""
        return [path for path, _ in self.replaced if path not in self.fused and path not in self.unfused]

    def __str__(self) -> str:
        counts = f"{len(self.replaced)} batch norms replaced, {len(self.fused)} fused"
        lines = [f"{counts}, {len(self.skipped)} kinds skipped" if self.skipped else counts]
        if self.fuse and self.unavailable_reason is not None:
            lines.append(f"nothing is fused: {self.unavailable_reason}")
        elif self.fuse and self.pending and not self.graphs and self.eager_reason is not None:
            lines.append(f"nothing is fused so far: calls {self.eager_reason} are not captured")
        elif self.fuse and self.pending and not self.graphs:
            lines.append("what is fused is known after the first call, or with example_inputs")
        elif self.fuse and self.pending:
            lines.append(f"{len(self.pending)} not captured so far: {', '.join(self.pending[:8])}")
        if self.limit_reached is not None:
            lines.append(f"the limit of {self.limit_reached} graphs for a module is reached: other calls are not fused")
        classes = dict(self.replaced)
        rows = []
        for path, kind in classes.items():
            if path in self.fused:
                rows.append(("fused", path, f"{kind} + {self.fused[path]}"))
            else:
                rows.append(("replaced", path, kind + (f": {self.unfused[path]}" if path in self.unfused else "")))
        rows += [("fused", path, what) for path, what in self.fused.items() if path not in classes]
        rows += [("skipped", path, why) for path, why in self.skipped]
        width = max((len(path) for _, path, _ in rows), default=0)
        lines += [f"  {kind:8}  {path:{width}}  {what}" for kind, path, what in rows]
        if self.bytes_before is not None and self.bytes_after is not None:
            share = 1 - self.bytes_after / max(self.bytes_before, 1)
            lines.append(
                f"saved for backward: {self.bytes_before / 2**20:.1f} MiB before, "
                f"{self.bytes_after / 2**20:.1f} MiB after ({abs(share):.0%} {'less' if share > 0 else 'more'})"
            )
        return "\n".join(lines)


_reports: weakref.WeakKeyDictionary[nn.Module, ConversionReport] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, report: ConversionReport) -> None:
    """Let :func:`conversion_report` find ``report``."""
    _reports[model] = report


def forget(model: nn.Module) -> None:
    """Undo :func:`remember`."""
    _reports.pop(model, None)


def conversion_report(model: nn.Module) -> ConversionReport:
    """What :func:`normfused.convert` did to ``model``, and what has been fused in its calls so far.

    Raises:
        ValueError: ``model`` is not what ``convert`` was called with. A copy of a converted model, or one loaded from a
            file, runs with our layers but fuses nothing until it is converted itself.
    """
    report = _reports.get(model)
    if report is None:
        raise ValueError(
            f"conversion_report: this {type(model).__name__} has not been converted; of a copy, or after loading, call "
            "normfused.convert again"
        )
    return report


def shorten(paths: list[str]) -> str:
    """``"a, b and 10 more"``."""
    return ", ".join(paths[:2]) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "")


def by_class(skipped: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each reason once, with the paths that it is about."""
    counts = Counter(why for _, why in skipped)
    return [(shorten([path for path, reason in skipped if reason == why]), why) for why in counts]


def bytes_saved_for_backward(model: nn.Module, *inputs: Any) -> int:
    """Bytes that a forward pass of ``model`` saves for backward, without its parameters and buffers.

    The pass runs as any other: it updates running statistics where the model is in training mode.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)  # keeps what is counted alive, so that no address is used twice
    del output
    return sum(kept.values())
