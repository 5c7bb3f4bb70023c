"""Whose kernels ran, by the names that torch.profiler reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# As CUPTI's names are demangled, or not.
OURS = ("normfused::cuda::", "9normfused4cuda")


class Kernels(NamedTuple):
    ours: Counter[str]  # how often each ran
    others: Counter[str]
    devices: set[int]  # where ours ran
    busy_seconds: float  # of all of them


def observe(call: Callable[[], Any]) -> Kernels:
    """The kernels that a call runs, on CUDA."""
    torch.cuda.synchronize()
    for _ in range(3):  # a profiler that has just been started can miss what is over at once
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        if events:
            break
    ours = [event for event in events if is_ours(event.name)]
    others = [event for event in events if not is_ours(event.name)]
    return Kernels(
        Counter(event.name for event in ours),
        Counter(event.name for event in others),
        {event.device_index for event in ours},
        sum(event.time_range.elapsed_us() for event in events) / 1e6,
    )


def is_ours(kernel: str) -> bool:
    return any(mark in kernel for mark in OURS)


class Unseen(AssertionError):  # noqa: N818
    """The profiler reported no kernel at all: of whose kernels ran nothing is known."""


def prove(what: str, call: Callable[[], Any], *, ours: bool) -> Kernels:
    """Assert that normfused's kernels ran, or that none of them did."""
    kernels = observe(call)
    if not kernels.ours and not kernels.others:
        raise Unseen(f"{what}: the profiler saw no kernel")
    if ours:
        assert kernels.ours, f"{what}: no kernel of normfused ran, but {_names(kernels.others)}"
    else:
        assert not kernels.ours, f"{what}: kernels of normfused ran: {_names(kernels.ours)}"
    return kernels


def _names(kernels: Counter[str]) -> str:
    return "; ".join(name[:100] for name in kernels)
