"""Times several calls in interleaved rounds, on the CPU and on CUDA."""

from __future__ import annotations

import functools
import gc
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

Samples = dict[str, list[float]]
Stopwatch = Callable[[Callable[[], Any]], float]
Sampler = Callable[[], float]  # makes one call, in this process or another, and returns its seconds


@dataclass(frozen=True)
class Budget:
    """The time for one case. Rounds run until `seconds` have passed, and at least `min_rounds` of them."""

    seconds: float
    min_rounds: int


FULL = Budget(seconds=0.3, min_rounds=11)
QUICK = Budget(seconds=0.1, min_rounds=5)
TINY = Budget(seconds=0.0, min_rounds=2)


class Quartiles(TypedDict):
    q1: float
    median: float
    q3: float


def quartiles(values: list[float]) -> Quartiles:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def ratios(samples: Samples, numerator: str, denominator: str) -> list[float]:
    """The ratio in each round. A slowdown of the whole machine affects both times of a round, and cancels."""
    return [a / b for a, b in zip(samples[numerator], samples[denominator], strict=True)]


def samplers(calls: Mapping[str, Callable[[], Any]], stopwatch: Stopwatch) -> dict[str, Sampler]:
    """Samplers of calls in this process."""
    return {name: functools.partial(stopwatch, call) for name, call in calls.items()}


# Work after which a processor that was idle has its full speed again. On a Xeon in a virtual machine, after a pause of
# 30 ms, a copy of 26 MB took 1.9 times as long, after 5 ms of copies still 1.9 times, after 10 ms 1.03 times, and batch
# norm 1.5, 1.7 and 1.1 times. It had its full speed after 20 to 40 ms.
WARM_SECONDS = 20e-3


def host_sampler(call: Callable[[], Any], inputs: Sequence[torch.Tensor]) -> Sampler:
    """A sampler of a call on the CPU that first repeats the call, wakes torch's threads and reads the call's inputs.

    So the state of processor, threads and caches is the same for every peer, in whatever process and from whatever
    allocator, and is that of a training loop, whose calls follow each other: the peer itself wrote to the memory of its
    outputs last, and its inputs were read since.
    """
    enough = torch.zeros(1 << 17)  # for torch to use several threads

    def seconds() -> float:
        end = time.perf_counter() + WARM_SECONDS
        call()
        while time.perf_counter() < end:
            call()
        for tensor in (enough, *inputs):
            tensor.sum()
        return _host_seconds(call)

    return seconds


def interleave(peers: Mapping[str, Sampler], budget: Budget, rest: Callable[[], None] = lambda: None) -> Samples:
    """Returns the seconds of each peer in each round. The caller has warmed the peers up.

    `rest` runs before each sample.
    """
    order = list(peers)
    shuffle = random.Random(0).shuffle
    samples: Samples = {name: [] for name in order}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget.seconds
        rounds = 0
        while rounds < budget.min_rounds or time.perf_counter() < end:
            rounds += 1
            # A call changes the state of caches and allocator for the next one. The order varies between rounds, so
            # that no call always follows the same one.
            shuffle(order)
            for name in order:
                rest()
                samples[name].append(peers[name]())
    finally:
        gc.enable()
    return samples


def make_stopwatch(device: str, *, host: bool = False) -> Stopwatch:
    """Returns a function that measures the seconds of one call, including the release of its result.

    On CUDA it measures device time between two events, with a cold L2 and without host time. With `host` it measures
    host time until the device has finished: the cost of a call that is too small to fill the device.
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
    """Device time of a call, between two events.

    Before the first event the device reads a buffer of several times its L2. That evicts the call's data. Unlike a
    write, it leaves no dirty lines for the call to write back. Then the device sleeps until the host has queued the
    whole call. The sleep was long enough if the first event has not passed when the last one is queued. Otherwise the
    call is measured again with twice the sleep, up to `max_cycles`. A call that synchronizes with the device can never
    be measured without host time, and is counted in ``uncovered``.
    """

    min_cycles = 1 << 16  # 33 us at 2 GHz
    max_cycles = 1 << 24  # 8 ms
    min_bytes = 256 << 20

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._buffer = torch.zeros(max(self.min_bytes, 4 * l2_bytes) // 4, device="cuda")
        self._sum = torch.zeros((), device="cuda")
        self._cycles: dict[Callable[[], Any], int] = {}
        self.uncovered: Counter[Callable[[], Any]] = Counter()

    def __call__(self, call: Callable[[], Any]) -> float:
        cycles = self._cycles.get(call, self.min_cycles)
        seconds, covered = self._measure(call, cycles)
        while not covered and cycles < self.max_cycles:
            cycles *= 2
            seconds, covered = self._measure(call, cycles)
        self._cycles[call] = cycles
        self.uncovered[call] += not covered
        return seconds

    def _measure(self, call: Callable[[], Any], cycles: int) -> tuple[float, bool]:
        """Returns the seconds, and whether the device slept until the whole call was queued."""
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
    """Captures a call in a CUDA graph and returns its replay, which returns the same tensors each time."""
    for _ in range(3):  # torch.cuda.graph requires a warm-up
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
