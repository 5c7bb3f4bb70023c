"""Performance targets, and whether the results reach them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cases import OPERATIONS, grid
from measure import Result
from peers import PEERS

# "speedup": time of a peer / time of normfused. "ceiling": time of the peer / time of a copy of the resident bytes, the
# upper bound of the speedup. The others: time of normfused / time of a copy, by each count of bytes (cases.Traffic).
Figure = Literal["speedup", "ceiling", "resident", "streaming", "planned"]

LARGE = 25_000_000  # bytes; smaller tensors may stay in cache, and do not count in comparisons with a copy
LARGE_ON_CUDA = 64_000_000  # larger than an L2


@dataclass(frozen=True)
class Target:
    device: Literal["cpu", "cuda"]
    operation: str | None  # None: every operation that the peer covers
    bound: float
    figure: Figure = "speedup"
    statistic: Literal["geometric mean", "worst"] = "geometric mean"
    min_bytes: int = 0
    peer: str = "torch"  # of a speedup

    @property
    def title(self) -> str:
        title = OPERATIONS[self.operation].title if self.operation else "Every operation"
        if self.peer != "torch":
            title += f", compared with {PEERS[self.peer].title}"
        if self.operation and self.figure in ("resident", "streaming"):
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
            if self.operation in (None, case.operation)
            and case.tensor_bytes >= self.min_bytes
            and PEERS[self.peer].covers(case)
        }
        values = [
            figure(result, self.figure, self.peer)
            for result in results
            if result["name"] in names and self.peer in result["speedup"]
        ]
        if len(values) < len(names):
            return None
        worst: Callable[[list[float]], float] = min if self.figure in ("speedup", "ceiling") else max
        return statistics.geometric_mean(values) if self.statistic == "geometric mean" else worst(values)

    def ceiling(self, results: Sequence[Result]) -> float | None:
        """The value at copy speed. None if the target is no speedup, or includes small calls, which overhead limits."""
        if self.figure != "speedup" or self.operation in (None, "small_call"):
            return None
        return replace(self, figure="ceiling").value(results)


def figure(result: Result, name: Figure, peer: str = "torch") -> float:
    """The median over the rounds of a ratio: see `Figure`."""
    if name == "ceiling":
        return figure(result, "speedup", peer) * figure(result, "resident")
    if name == "speedup":
        return result["speedup"][peer]["median"]
    return result["floor_distance"][name]["median"]


# A fraction f of copy bandwidth is a time of 1 / f relative to a copy.
TARGETS = (
    Target("cpu", "training_forward", 3.2),
    Target("cpu", "training_forward_backward", 2.6),
    Target("cpu", "relu_forward_backward", 3.2),
    Target("cpu", "add_relu_forward_backward", 3.1),
    Target("cpu", "eval_forward", 2.0),
    Target("cpu", "channel_moments", 20),
    Target("cpu", "small_call", 1.3),
    Target("cpu", None, 1.0, statistic="worst"),
    Target("cpu", "training_forward", 2.0, peer="kept"),
    Target("cpu", "training_forward_backward", 1.8, peer="kept"),
    Target("cpu", "relu_forward_backward", 2.0, peer="kept"),
    Target("cpu", "add_relu_forward_backward", 1.7, peer="kept"),
    Target("cpu", "eval_forward", 1.2, peer="kept"),
    Target("cpu", None, 0.95, statistic="worst", peer="kept"),
    Target("cpu", None, 1.0, statistic="worst", peer="onednn"),
    Target("cpu", "training_forward", 2.5, peer="mkldnn"),
    Target("cpu", "training_forward", 1.3, "resident", min_bytes=LARGE),
    Target("cpu", "training_forward", 1.3, "streaming", min_bytes=LARGE),
    Target("cpu", "training_backward", 1.3, "resident", min_bytes=LARGE),
    Target("cpu", "training_backward", 1.3, "streaming", min_bytes=LARGE),
    Target("cuda", "training_forward_backward", 1.5),
    Target("cuda", "training_forward_backward", 1.0, statistic="worst"),
    Target("cuda", "add_relu_forward_backward", 2),
    Target("cuda", "training_forward", 1 / 0.8, "planned", min_bytes=LARGE_ON_CUDA),
    Target("cuda", "training_backward", 1 / 0.8, "planned", min_bytes=LARGE_ON_CUDA),
    Target("cuda", "training_forward", 1 / 0.85, "resident"),
    Target("cuda", "training_backward", 1 / 0.85, "resident"),
    Target("cuda", "channel_moments", 1 / 0.8, "resident"),
)
