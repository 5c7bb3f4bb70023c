"""Measures one case: checks the results of every peer, times them, and summarizes the samples."""

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
    """One case in results.json."""

    name: str
    operation: str
    shape: list[int]
    dtype: str
    layout: str
    tensor_bytes: int
    rounds: int
    seconds: dict[str, Quartiles]  # by peer
    speedup: dict[str, Quartiles]  # by peer: time of the peer / time of normfused, in each round
    floor_distance: dict[str, Quartiles]  # by Traffic: time of normfused / time of copying as many bytes
    error: NotRequired[dict[str, float]]  # by peer, relative to the largest value
    uncovered: NotRequired[dict[str, int]]  # by peer, on CUDA: rounds that may include host time, see timing.py


class Measurement(NamedTuple):
    samples: Samples
    error: dict[str, float]
    uncovered: dict[str, int]
    unseen: str | None = None  # why the profiler could not tell which library's kernels ran


def measure(
    case: Case, device: str, budget: Budget, more: Sequence[str] = (), *, graphs: bool = False, profile: bool = False
) -> Measurement:
    """Times the peers of a case, after comparing the results of each timed call with float64.

    With `graphs`, each call is captured in a CUDA graph and its replay is timed. With `profile`, the profiler checks
    that normfused's kernels run in normfused's calls, and in no other peer's. Both are for CUDA only.

    Raises:
        AssertionError: the results of a peer are wrong, or it ran another library's kernels.
    """
    unseen = None
    # A backward pass runs on the stream of its forward pass, so both must run on the stream that is captured.
    stream = torch.cuda.Stream() if graphs and device == "cuda" else None
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        calls = build_calls(case, device, more)
        if stream is not None:
            calls = {peer: capture(call, stream) for peer, call in calls.items()}
        oracle, error = Oracle(case, device), {}
        for peer, call in calls.items():
            error[peer] = oracle.error(peer, call())
            assert error[peer] <= WRONG[case.dtype], f"{case.name}: relative error of {peer} is {error[peer]:.1e}"
        del oracle  # it holds tensors as large as the case's
        try:
            for peer, call in calls.items() if profile else ():
                prove(f"{case.name}, {peer}", call, ours=peer == "normfused")
        except Unseen as nothing:
            unseen = str(nothing)
        stopwatch = make_stopwatch(device, host=case.operation == "small_call")
        for call in [*calls.values()] * 2:
            stopwatch(call)  # warm-up: compilation, caches, memory pools
        uncovered = getattr(stopwatch, "uncovered", {})
        uncovered.clear()
        samples = interleave(calls, stopwatch, budget)
    counts = {peer: n for peer, call in calls.items() if (n := uncovered.get(call))}
    return Measurement(samples, error, counts, unseen)


def complaint(case: Case, measurement: Measurement) -> str | None:
    """Why a measurement is not valid: normfused exceeds its tolerance, or its kernels were not identified."""
    error, allowed = measurement.error["normfused"], TOLERANCE[case.dtype]
    if error > allowed:
        return f"relative error {error:.1e} exceeds the tolerance {allowed:.1e}"
    return measurement.unseen


def summarize(case: Case, measurement: Measurement, device: str) -> Result:
    """Medians and quartiles of a measurement."""
    samples = measurement.samples
    to_copy = ratios(samples, "normfused", "copy")
    copied_bytes = 2 * case.tensor_bytes  # read and written
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
            traffic: quartiles([ratio * copied_bytes / traffic_bytes(case, traffic) for ratio in to_copy])
            for traffic in counts
        },
        "error": measurement.error,
        "uncovered": measurement.uncovered,
    }
