"""Performance targets, and whether the results reach them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cases import OPERATIONS, grid
from measure import Result

# "speedup": time of torch / time of normfused. "ceiling": time of torch / time of a copy of the resident bytes, the
# upper bound of the speedup. The others: time of normfused / time of a copy, by each count of bytes (cases.Traffic).
Figure = Literal["speedup", "ceiling", "resident", "streaming", "planned"]

LARGE = 25_000_000  # bytes; smaller tensors may stay in cache, and do not count in comparisons with a copy
LARGE_ON_CUDA = 64_000_000  # larger than an L2


@dataclass(frozen=True)
class Target:
    device: Literal["cpu", "cuda"]
    operation: str
    bound: float
    figure: Figure = "speedup"
    statistic: Literal["geometric mean", "worst"] = "geometric mean"
    min_bytes: int = 0

    @property
    def title(self) -> str:
        title = OPERATIONS[self.operation].title
        if self.figure in ("resident", "streaming"):
            reads, writes = getattr(OPERATIONS[self.operation], self.figure)
            title += f", time relative to a copy of {reads}R + {writes}W"
        if self.figure == "planned":
            title += ", time relative to a copy of the planned bytes"
        if self.min_bytes:
            title += f", tensors ≥ {self.min_bytes // 10**6} MB"
        return title

    @property
    def requirement(self) -> str:
        return f"{'≥' if self.figure == 'speedup' else '≤'} {self.bound:.3g}×"

    def reached(self, value: float) -> bool:
        return value >= self.bound if self.figure == "speedup" else value <= self.bound

    def value(self, results: Sequence[Result]) -> float | None:
        """The measured value, or None unless all cases of the target were measured."""
        names = {
            case.name
            for case in grid(self.device)
            if case.operation == self.operation and case.tensor_bytes >= self.min_bytes
        }
        values = [figure(result, self.figure) for result in results if result["name"] in names]
        if len(values) < len(names):
            return None
        worst: Callable[[list[float]], float] = min if self.figure in ("speedup", "ceiling") else max
        return statistics.geometric_mean(values) if self.statistic == "geometric mean" else worst(values)

    def ceiling(self, results: Sequence[Result]) -> float | None:
        """The value at copy speed. None for targets that are no speedup, and for small calls, which overhead limits."""
        if self.figure != "speedup" or self.operation == "small_call":
            return None
        return replace(self, figure="ceiling").value(results)


def figure(result: Result, name: Figure) -> float:
    """The median over the rounds of a ratio: see `Figure`."""
    if name == "ceiling":
        return figure(result, "speedup") * figure(result, "resident")
    if name == "speedup":
        return result["speedup"]["torch"]["median"]
    return result["floor_distance"][name]["median"]


# A fraction f of copy bandwidth is a time of 1 / f relative to a copy.
TARGETS = (
    Target("cpu", "training_forward", 3.5),
    Target("cpu", "training_forward_backward", 2.5),
    Target("cpu", "training_forward_backward", 1.2, statistic="worst"),
    Target("cpu", "relu_forward_backward", 3.5),
    Target("cpu", "add_relu_forward_backward", 4),
    Target("cpu", "eval_forward", 1.5),
    Target("cpu", "channel_moments", 20),
    Target("cpu", "small_call", 1.0, statistic="worst"),
    Target("cpu", "training_forward", 1.6, "resident", min_bytes=LARGE),
    Target("cpu", "training_forward", 1.6, "streaming", min_bytes=LARGE),
    Target("cpu", "training_backward", 1.6, "resident", min_bytes=LARGE),
    Target("cpu", "training_backward", 1.6, "streaming", min_bytes=LARGE),
    Target("cuda", "training_forward_backward", 1.5),
    Target("cuda", "training_forward_backward", 1.0, statistic="worst"),
    Target("cuda", "add_relu_forward_backward", 2),
    Target("cuda", "training_forward", 1 / 0.8, "planned", min_bytes=LARGE_ON_CUDA),
    Target("cuda", "training_backward", 1 / 0.8, "planned", min_bytes=LARGE_ON_CUDA),
    Target("cuda", "training_forward", 1 / 0.85, "resident"),
    Target("cuda", "training_backward", 1 / 0.85, "resident"),
    Target("cuda", "channel_moments", 1 / 0.8, "resident"),
)
