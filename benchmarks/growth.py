"""Memory growth of a process over many training steps."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

import normfused

STEPS = 10_000
WARM_UP = 1_000
# A leak of malloc's smallest block, 32 bytes, in each step adds up to this.
LEAK_KB = STEPS * 32 / 1024


class Growth(TypedDict):
    peer: str
    steps: int
    host_kb: float
    device_kb: float


def measure_growth(device: str, threads: int) -> list[Growth]:
    """Growth over `STEPS` steps for each peer, each in its own process. Empty without /proc."""
    if not Path("/proc/self/statm").exists():
        return []
    growths = []
    for peer in ("normfused", "torch"):
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            growths.append(process.submit(_growth, peer, device, threads).result())
    return growths


def _growth(peer: str, device: str, threads: int) -> Growth:
    torch.set_num_threads(threads)
    layer = {"normfused": normfused.BatchNorm2d, "torch": nn.BatchNorm2d}[peer]
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
