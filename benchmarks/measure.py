"""One case from calls to figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from cases import Case, Traffic, build_calls, check, dtype_name, traffic_bytes
from timing import Budget, Quartiles, Samples, interleave, make_stopwatch, quartiles, ratios


class Result(TypedDict):
    name: str
    operation: str
    shape: list[int]
    dtype: str
    layout: str
    tensor_bytes: int
    rounds: int
    seconds: dict[str, Quartiles]  # of each peer
    speedup: dict[str, Quartiles]  # the peer's time over normfused's, round by round
    floor_distance: dict[str, Quartiles]  # normfused's time over that of the bytes at copy speed


def measure(case: Case, device: str, budget: Budget, more: Sequence[str] = ()) -> Samples:
    """Seconds of each peer in each round, after a check of normfused's results.

    Raises:
        AssertionError: they are wrong.
    """
    calls = build_calls(case, device, more)
    check(case, device, calls["normfused"]())
    stopwatch = make_stopwatch(device, host=case.operation == "small_call")
    for call in [*calls.values()] * 2:
        stopwatch(call)  # warms up: compiles, fills caches and pools
    return interleave(calls, stopwatch, budget)


def summarize(case: Case, samples: Samples, device: str) -> Result:
    to_copy = ratios(samples, "normfused", "copy")
    copied = 2 * case.tensor_bytes
    counts: list[Traffic] = ["resident", "streaming", *(["planned"] if device == "cuda" else [])]
    return {
        "name": case.name,
        "operation": case.operation,
        "shape": list(case.shape),
        "dtype": dtype_name(case.dtype),
        "layout": case.layout,
        "tensor_bytes": case.tensor_bytes,
        "rounds": len(to_copy),
        "seconds": {peer: quartiles(times) for peer, times in samples.items()},
        "speedup": {peer: quartiles(ratios(samples, peer, "normfused")) for peer in samples if peer != "normfused"},
        "floor_distance": {
            traffic: quartiles([r * copied / traffic_bytes(case, traffic) for r in to_copy]) for traffic in counts
        },
    }
