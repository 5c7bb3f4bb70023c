"""Measures several calls against each other: interleaved, in medians, on CPU and CUDA."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections import Counter
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
TINY = Budget(seconds=0.0, least_rounds=2)


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

    On CUDA the time between two events on the stream, with a cold L2 and nothing of the host's time; with `host` the
    time on the host until the device is done, which is what a call too small to fill the device costs.
    """
    if device == "cpu":
        return _host_seconds
    if host:
        return _synchronized_seconds
    return CudaEvents()


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


class CudaEvents:
    """The device's time for a call, between two events.

    Before the first event the device reads a buffer of several times its L2, which leaves there nothing of the call's
    and no dirty line for the call to write back, as a written buffer would; then it sleeps until the host has queued
    the whole call. Whether it slept long enough is seen from the first event, which must not have passed when the last
    is queued: if it has, the device sleeps twice as long in a new attempt, up to some milliseconds. A call that waits
    for the device is never covered, and is counted in ``uncovered``.
    """

    least_cycles = 1 << 16  # 33 us at 2 GHz
    most_cycles = 1 << 24  # 8 ms
    least_bytes = 256 << 20

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._buffer = torch.zeros(max(self.least_bytes, 4 * l2_bytes) // 4, device="cuda")
        self._sum = torch.zeros((), device="cuda")
        self._cycles: dict[Callable[[], Any], int] = {}
        self.uncovered: Counter[Callable[[], Any]] = Counter()

    def __call__(self, call: Callable[[], Any]) -> float:
        cycles = self._cycles.get(call, self.least_cycles)
        seconds, covered = self._measure(call, cycles)
        while not covered and cycles < self.most_cycles:
            cycles *= 2
            seconds, covered = self._measure(call, cycles)
        self._cycles[call] = cycles
        self.uncovered[call] += not covered
        return seconds

    def _measure(self, call: Callable[[], Any], cycles: int) -> tuple[float, bool]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(self._buffer, 0, out=self._sum)
        torch.cuda._sleep(cycles)
        start.record()
        call()
        end.record()
        covered = not start.query()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, covered


def capture(call: Callable[[], Any], stream: torch.cuda.Stream) -> Callable[[], Any]:
    """The replay of a CUDA graph of one call; gives the same tensors each time."""
    for _ in range(3):  # warms up, as torch.cuda.graph asks
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
