"""The figures to reach, and whether the results do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cases import OPERATIONS, grid
from measure import Result

# Times faster than torch; how many times faster the bytes are moved at copy speed, by the resident count, which is as
# fast as anyone can be; and normfused's distance to the floor by one of the counts of bytes.
Figure = Literal["speedup", "ceiling", "resident", "streaming", "planned"]

LARGE = 25_000_000  # bytes from which the distance to the floor counts
LARGE_ON_CUDA = 64_000_000  # more than an L2 holds


@dataclass(frozen=True)
class Target:
    device: Literal["cpu", "cuda"]
    operation: str
    bound: float
    figure: Figure = "speedup"
    statistic: Literal["geometric mean", "worst"] = "geometric mean"
    least_bytes: int = 0

    @property
    def title(self) -> str:
        title = OPERATIONS[self.operation].title
        if self.figure in ("resident", "streaming"):
            reads, writes = getattr(OPERATIONS[self.operation], self.figure)
            title += f", distance to the floor {reads}R + {writes}W"
        if self.figure == "planned":
            title += ", distance to the floor of the bytes as planned"
        if self.least_bytes:
            title += f", tensors ≥ {self.least_bytes // 10**6} MB"
        return title

    @property
    def requirement(self) -> str:
        return f"{'≥' if self.figure == 'speedup' else '≤'} {self.bound:.3g}×"

    def reached(self, value: float) -> bool:
        return value >= self.bound if self.figure == "speedup" else value <= self.bound

    def value(self, results: Sequence[Result]) -> float | None:
        """None unless every case that the target is about was measured."""
        wanted = {
            case.name
            for case in grid(self.device)
            if case.operation == self.operation and case.tensor_bytes >= self.least_bytes
        }
        values = [figure(result, self.figure) for result in results if result["name"] in wanted]
        if len(values) < len(wanted):
            return None
        worst: Callable[[list[float]], float] = min if self.figure in ("speedup", "ceiling") else max
        return statistics.geometric_mean(values) if self.statistic == "geometric mean" else worst(values)

    def ceiling(self, results: Sequence[Result]) -> float | None:
        """What the target's value would be at copy speed; None where that says nothing."""
        if self.figure != "speedup" or self.operation == "small_call":
            return None
        return replace(self, figure="ceiling").value(results)


def figure(result: Result, name: Figure) -> float:
    """The median ratio to torch eager, or to the floor."""
    if name == "ceiling":
        return figure(result, "speedup") * figure(result, "resident")
    if name == "speedup":
        return result["speedup"]["torch"]["median"]
    return result["floor_distance"][name]["median"]


# Shares of copy bandwidth are distances to the floor turned over.
TARGETS = (
    Target("cpu", "training_forward", 3.5),
    Target("cpu", "training_forward_backward", 2.5),
    Target("cpu", "training_forward_backward", 1.2, statistic="worst"),
    Target("cpu", "relu_forward_backward", 3.5),
    Target("cpu", "add_relu_forward_backward", 4),
    Target("cpu", "eval_forward", 1.5),
    Target("cpu", "channel_moments", 20),
    Target("cpu", "small_call", 1.0, statistic="worst"),
    Target("cpu", "training_forward", 1.6, "resident", least_bytes=LARGE),
    Target("cpu", "training_forward", 1.6, "streaming", least_bytes=LARGE),
    Target("cpu", "training_backward", 1.6, "resident", least_bytes=LARGE),
    Target("cpu", "training_backward", 1.6, "streaming", least_bytes=LARGE),
    Target("cuda", "training_forward_backward", 1.5),
    Target("cuda", "training_forward_backward", 1.0, statistic="worst"),
    Target("cuda", "add_relu_forward_backward", 2),
    Target("cuda", "training_forward", 1 / 0.8, "planned", least_bytes=LARGE_ON_CUDA),
    Target("cuda", "training_backward", 1 / 0.8, "planned", least_bytes=LARGE_ON_CUDA),
    Target("cuda", "training_forward", 1 / 0.85, "resident"),
    Target("cuda", "training_backward", 1 / 0.85, "resident"),
    Target("cuda", "channel_moments", 1 / 0.8, "resident"),
)
