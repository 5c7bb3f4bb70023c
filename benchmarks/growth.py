"""Memory of a process over many training steps: growth with equal steps, and its level with steps of varying sizes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

import normfused

STEPS = 10_000
WARM_UP = 1_000
# A leak of malloc's smallest block, 32 bytes, in each step adds up to this.
LEAK_KB = STEPS * 32 / 1024
# With varying sizes, memory levels off if its maximum in the second half is at most this times that of the first half.
LEVEL = 1.05


class Growth(TypedDict):
    peer: str
    steps: int
    host_kb: float
    device_kb: float


class Level(TypedDict):
    peer: str
    steps: int
    first_half_mb: float  # the maximum of the resident set
    second_half_mb: float
    pool_mb: float  # the maximum that the pool held


LAYERS: dict[str, type[nn.Module]] = {"normfused": normfused.BatchNorm2d, "torch": nn.BatchNorm2d}


def measure_growth(device: str, threads: int) -> list[Growth]:
    """Growth over `STEPS` steps for each peer, each in its own process. Empty without /proc."""
    return [] if _no_proc() else [_in_process(_growth, peer, device, threads) for peer in LAYERS]


def measure_levels(threads: int) -> list[Level]:
    """Memory over `STEPS` steps of varying sizes on the CPU, for each peer in its own process. Empty without /proc."""
    return [] if _no_proc() else [_in_process(_level, peer, threads) for peer in LAYERS]


def _no_proc() -> bool:
    return not Path("/proc/self/statm").exists()


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def _level(peer: str, threads: int) -> Level:
    """Trains a layer on batches of 1 to 16 images of 32x32 to 96x96: outputs of 64 KiB to 9 MiB."""
    torch.set_num_threads(threads)
    layer, sizes = LAYERS[peer](16), random.Random(0)
    largest = torch.rand(16, 16, 96, 96)
    maxima, held = [0.0, 0.0], 0
    for step in range(STEPS):
        side = sizes.randint(32, 96)
        x = largest[: sizes.randint(1, 16), :, :side, :side].contiguous().requires_grad_()
        layer(x).square().mean().backward()
        half = step * 2 // STEPS
        maxima[half] = max(maxima[half], _host_kb())
        stats = normfused.memory_stats()
        held = max(held, stats["allocated_bytes"] + stats["cached_bytes"])
    first, second = maxima
    return {
        "peer": peer,
        "steps": STEPS,
        "first_half_mb": first / 1024,
        "second_half_mb": second / 1024,
        "pool_mb": held / 2**20,
    }


def _growth(peer: str, device: str, threads: int) -> Growth:
    torch.set_num_threads(threads)
    layer = LAYERS[peer]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), layer(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(8, 3, 8, 8, device=device)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    train(WARM_UP)
    host, on_device = _host_kb(), _device_kb(device)
    train(STEPS)
    return {
        "peer": peer,
        "steps": STEPS,
        "host_kb": _host_kb() - host,
        "device_kb": _device_kb(device) - on_device,
    }


def _host_kb() -> float:
    """Resident set size."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def _device_kb(device: str) -> float:
    return torch.cuda.memory_allocated() / 1024 if device == "cuda" else 0.0
