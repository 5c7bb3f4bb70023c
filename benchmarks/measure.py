"""One case from calls to figures."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from cases import TOLERANCE, WRONG, Case, Oracle, Traffic, build_calls, dtype_name, traffic_bytes
from proof import Unseen, prove
from timing import Budget, Quartiles, Samples, capture, interleave, make_stopwatch, quartiles, ratios
from typing_extensions import NotRequired


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
    error: NotRequired[dict[str, float]]  # of each peer, relative to its largest value, before it was timed
    uncovered: NotRequired[dict[str, int]]  # on CUDA, rounds whose time may hold the host's: see timing.py


class Measurement(NamedTuple):
    samples: Samples  # seconds of each peer in each round
    error: dict[str, float]
    uncovered: dict[str, int]
    unseen: str | None = None  # why the profiler could not say whose kernels ran


def measure(
    case: Case, device: str, budget: Budget, more: Sequence[str] = (), *, graphs: bool = False, profile: bool = False
) -> Measurement:
    """Times the peers of a case after the results of each, as it is timed, were compared with float64.

    With `graphs` each call is captured in a CUDA graph, whose replay is timed; only on CUDA. With `profile` the names
    of the kernels must show that normfused's calls run normfused's kernels, and nobody else's do; only on CUDA.

    Raises:
        AssertionError: a peer's results are wrong, or its kernels are not its own.
    """
    unseen = None
    # A backward runs on its forward's stream, which a capture must see.
    stream = torch.cuda.Stream() if graphs and device == "cuda" else None
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        calls = build_calls(case, device, more)
        if stream is not None:
            calls = {peer: capture(call, stream) for peer, call in calls.items()}
        oracle, error = Oracle(case, device), {}
        for peer, call in calls.items():
            error[peer] = oracle.error(peer, call())
            assert error[peer] <= WRONG[case.dtype], (
                f"{case.name}: {peer} is off by {error[peer]:.1e} of the largest value"
            )
        del oracle  # as large as the tensors
        try:
            for peer, call in calls.items() if profile else ():
                prove(f"{case.name}, {peer}", call, ours=peer == "normfused")
        except Unseen as nothing:
            unseen = str(nothing)
        stopwatch = make_stopwatch(device, host=case.operation == "small_call")
        for call in [*calls.values()] * 2:
            stopwatch(call)  # warms up: compiles, fills caches and pools
        uncovered = getattr(stopwatch, "uncovered", {})
        uncovered.clear()
        samples = interleave(calls, stopwatch, budget)
    counts = {peer: n for peer, call in calls.items() if (n := uncovered.get(call))}
    return Measurement(samples, error, counts, unseen)


def complaint(case: Case, measurement: Measurement) -> str | None:
    """What speaks against figures that were measured: less exact than promised, or nobody knows whose."""
    error, allowed = measurement.error["normfused"], TOLERANCE[case.dtype]
    if error > allowed:
        return f"off by {error:.1e} of the largest value, where {allowed:.1e} is allowed"
    return measurement.unseen


def summarize(case: Case, measurement: Measurement, device: str) -> Result:
    samples = measurement.samples
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
        "error": measurement.error,
        "uncovered": measurement.uncovered,
    }
