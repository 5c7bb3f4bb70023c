"""Proves whose kernels a call runs, by the kernel names that torch.profiler reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# In demangled and in mangled names; CUPTI reports either.
OURS = ("normfused::cuda::", "9normfused4cuda")


class Kernels(NamedTuple):
    ours: Counter[str]  # normfused's kernels: name to number of launches
    others: Counter[str]
    devices: set[int]  # indices of the devices that ran normfused's kernels
    busy_seconds: float  # total time of all kernels


def observe(call: Callable[[], Any]) -> Kernels:
    """Profiles the CUDA kernels that a call runs."""
    torch.cuda.synchronize()
    for _ in range(3):  # a profiler that has just started can miss short kernels
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
    """The profiler reported no kernel at all, so nothing is known about whose kernels ran."""


def prove(what: str, call: Callable[[], Any], *, ours: bool) -> Kernels:
    """Asserts that a call runs at least one kernel of normfused, or with ``ours=False`` none."""
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
