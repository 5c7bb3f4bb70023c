"""Measures one case: checks the results of every peer, times them, and summarizes the samples."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

import machine
import torch
from cases import TOLERANCE, WRONG, Call, Case, Oracle, Traffic, build_calls, dtype_name, inputs_read, traffic_bytes
from peers import LOCAL, REMOTE, peer_names
from proof import Unseen, prove
from timing import (
    Budget,
    Quartiles,
    Sampler,
    Samples,
    Stopwatch,
    capture,
    host_sampler,
    interleave,
    make_stopwatch,
    quartiles,
    ratios,
    samplers,
)
from typing_extensions import NotRequired
from worker import Worker, rest


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
    notes: NotRequired[dict[str, str]]  # by peer: what it chose for the case, for example a layout
    fits: NotRequired[str | None]  # on the CPU: the smallest cache that holds an input and an output, see machine.py
    uncovered: NotRequired[dict[str, int]]  # by peer, on CUDA: rounds that may include host time, see timing.py


class Measurement(NamedTuple):
    samples: Samples
    error: dict[str, float]
    uncovered: dict[str, int]
    unseen: str | None = None  # why the profiler could not tell which library's kernels ran
    notes: dict[str, str] = {}  # noqa: RUF012 - by peer: what it chose for the case


def measure(
    case: Case,
    device: str,
    budget: Budget,
    peers: Sequence[str] = LOCAL,
    *,
    workers: Sequence[Worker] = (),
    graphs: bool = False,
    profile: bool = False,
) -> Measurement:
    """Times the peers of a case, after comparing the results of each timed call with float64.

    Peers of the workers run in their processes, all others in this one. With `graphs`, each call is captured in a CUDA
    graph and its replay is timed. With `profile`, the profiler checks that normfused's kernels run in normfused's
    calls, and in no other peer's. Both are for CUDA only.

    Raises:
        AssertionError: the results of a peer are wrong, or it ran another library's kernels.
        WorkerError: a worker failed.
    """
    names = peer_names(case, peers)
    unseen = None
    # A backward pass runs on the stream of its forward pass, so both must run on the stream that is captured.
    stream = torch.cuda.Stream() if graphs and device == "cuda" else None
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        remote, error, notes = _prepare([w for w in workers if set(w.peers) & set(names)], case)
        calls = build_calls(case, device, [name for name in names if name not in REMOTE])
        if stream is not None:
            calls = {peer: capture(call, stream) for peer, call in calls.items()}
        oracle = Oracle(case, device)
        for peer, call in calls.items():
            error[peer] = oracle.error(peer, call())
        del oracle  # it holds tensors as large as the case's
        _assert_correct(case, error)
        try:
            for peer, call in calls.items() if profile else ():
                prove(f"{case.name}, {peer}", call, ours=peer == "normfused")
        except Unseen as nothing:
            unseen = str(nothing)
        stopwatch = make_stopwatch(device, host=case.operation == "small_call")
        found = _local_samplers(case, device, calls, stopwatch) | remote
        timed = {peer: found[peer] for peer in names if peer in found}
        for sampler in [*timed.values()] * 2:
            sampler()  # warm-up: compilation, caches, memory pools
        uncovered = getattr(stopwatch, "uncovered", {})
        uncovered.clear()
        samples = interleave(timed, budget, rest(workers) if remote else lambda: None)
    counts = {peer: n for peer, call in calls.items() if (n := uncovered.get(call))}
    return Measurement(samples, error, counts, unseen, notes)


def _prepare(workers: Sequence[Worker], case: Case) -> tuple[dict[str, Sampler], dict[str, float], dict[str, str]]:
    """The samplers, errors and notes of the workers' peers, by peer."""
    remote: dict[str, Sampler] = {}
    error: dict[str, float] = {}
    notes: dict[str, str] = {}
    for worker in workers:
        prepared = worker.prepare(case)
        error |= prepared.error
        remote |= {peer: worker.sampler(peer) for peer in prepared.error}
        notes |= {peer: prepared.note for peer in worker.peers if prepared.note}
    return remote, error, notes


def _assert_correct(case: Case, error: Mapping[str, float]) -> None:
    for peer, value in error.items():
        assert value <= WRONG[case.dtype], f"{case.name}: relative error of {peer} is {value:.1e}"


def _local_samplers(case: Case, device: str, calls: Mapping[str, Call], stopwatch: Stopwatch) -> dict[str, Sampler]:
    if device == "cuda":
        return samplers(calls, stopwatch)
    return {peer: host_sampler(call, inputs_read(case)) for peer, call in calls.items()}


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
        "notes": measurement.notes,
        "fits": machine.fits(2 * case.tensor_bytes) if device == "cpu" else None,
        "uncovered": measurement.uncovered,
    }


def median_result(results: Sequence[Result]) -> Result:
    """A case in several runs: the median of each figure over the runs that have it, and the largest error."""
    merged = copy.deepcopy(results[0])
    merged["rounds"] = min(result["rounds"] for result in results)
    for field in ("seconds", "speedup", "floor_distance"):
        figures = [result[field] for result in results]  # type: ignore[literal-required]
        merged[field] = {  # type: ignore[literal-required]
            key: {
                quartile: statistics.median(run[key][quartile] for run in figures if key in run)
                for quartile in ("q1", "median", "q3")
            }
            for key in dict.fromkeys(key for run in figures for key in run)
        }
    if errors := [result["error"] for result in results if "error" in result]:
        merged["error"] = {
            peer: max(run[peer] for run in errors if peer in run)
            for peer in dict.fromkeys(peer for run in errors for peer in run)
        }
    return merged
