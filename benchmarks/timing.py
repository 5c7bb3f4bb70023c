"""Measures several calls against each other: interleaved, in medians, on CPU and CUDA."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

Samples = dict[str, list[float]]
Stopwatch = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Budget:
    """How long one case may take: `seconds`, or `least_rounds` where those take longer."""

    seconds: float
    least_rounds: int


FULL = Budget(seconds=0.3, least_rounds=15)
QUICK = Budget(seconds=0.1, least_rounds=5)


class Quartiles(TypedDict):
    q1: float
    median: float
    q3: float


def quartiles(values: list[float]) -> Quartiles:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def ratios(samples: Samples, numerator: str, denominator: str) -> list[float]:
    """Round by round, so that what slowed a whole round cancels."""
    return [a / b for a, b in zip(samples[numerator], samples[denominator], strict=True)]


def interleave(calls: Mapping[str, Callable[[], Any]], stopwatch: Stopwatch, budget: Budget) -> Samples:
    """Seconds of each call in each round. The calls must have been warmed up."""
    order = list(calls)
    shuffle = random.Random(0).shuffle
    samples: Samples = {name: [] for name in order}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget.seconds
        rounds = 0
        while rounds < budget.least_rounds or time.perf_counter() < end:
            rounds += 1
            # A call leaves its mark on caches and allocator: nobody always runs behind the same neighbour.
            shuffle(order)
            for name in order:
                samples[name].append(stopwatch(calls[name]))
    finally:
        gc.enable()
    return samples


def make_stopwatch(device: str, *, host: bool = False) -> Stopwatch:
    """Seconds that one call takes, the release of its result included.

    On CUDA the time between two events on the stream, with a cold L2; with `host` the time on the host until the device
    is done, which is what a call too small to fill the device costs.
    """
    if device == "cpu":
        return _host_seconds
    if host:
        return _synchronized_seconds
    return _CudaEvents()


def _host_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _synchronized_seconds(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class _CudaEvents:
    def __init__(self) -> None:
        # Written before each call: empties L2, and keeps the device busy while the host prepares the launches.
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
