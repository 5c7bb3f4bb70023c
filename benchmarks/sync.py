"""Cost of synchronization: SyncBatchNorm on two ranks, compared with unsynchronized batch norm plus the collectives.

The peer runs its collectives where SyncBatchNorm does, after the kernels of the forward and the backward pass. Ranks
that come from other work wait for each other and for threads to be scheduled; ranks that run only collectives do not.

``python benchmarks/sync.py`` writes sync.json and sync.md to results/<device>/. On the CPU the ranks share the threads
(gloo). On CUDA each rank has its own GPU (nccl).
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import tables
import torch
from cases import MEMORY_FORMATS
from timing import make_stopwatch, ratios
from torch import Tensor, distributed, nn

import normfused

RANKS = 2
ROUNDS = 150
TARGET = 1.25
SHAPES = ((16, 256, 28, 28), (16, 64, 56, 56), (16, 2048, 7, 7), (2, 64, 8, 8))
OURS, WITH_COLLECTIVES, ALONE, BARE = "SyncBatchNorm", "BatchNorm2d with collectives", "BatchNorm2d", "collectives"
WARM_UP = 5  # rounds
Call = Callable[[], Any]


def nothing() -> None:
    pass


def step(
    layer: nn.Module, x: Tensor, grad: Tensor, after_forward: Call = nothing, after_backward: Call = nothing
) -> Call:
    """A call of forward + backward, each followed by a collective if given."""

    def run() -> None:
        output = layer(x)
        after_forward()
        gradients = torch.autograd.grad(output, [x, *layer.parameters()], grad)
        after_backward()
        del gradients  # not before the collective

    return run


def collectives(channels: int, device: torch.device) -> tuple[Call, Call]:
    """The collectives of SyncBatchNorm's forward and backward pass, with as many elements."""
    words = torch.zeros(channels + 1, dtype=torch.int64, device=device)
    gathered = [torch.zeros_like(words) for _ in range(RANKS)]
    sums = torch.zeros(2 * channels, device=device)
    return lambda: distributed.all_gather(gathered, words), lambda: distributed.all_reduce(sums)


def measure_rank(rank: int, device_type: str, threads: int, folder: str) -> None:
    """Runs on each rank. Rank 0 saves the rows to ``folder``/rows."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    torch.set_num_threads(max(1, threads // RANKS))
    backend = "nccl" if device_type == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    stopwatch = make_stopwatch(device_type, host=True)
    rows = []
    for shape in SHAPES:
        for layout, memory_format in MEMORY_FORMATS.items():
            x = torch.randn(shape, device=device).contiguous(memory_format=memory_format).requires_grad_()
            grad = torch.randn_like(x)
            layers = normfused.SyncBatchNorm(shape[1]).to(device), normfused.BatchNorm2d(shape[1]).to(device)
            bare = collectives(shape[1], device)
            calls = {
                OURS: step(layers[0], x, grad),
                WITH_COLLECTIVES: step(layers[1], x, grad, *bare),
                ALONE: step(layers[1], x, grad),
                BARE: lambda bare=bare: [collective() for collective in bare],  # type: ignore[misc]
            }
            samples = torch.tensor(list(interleaved(calls, stopwatch).values()), device=device)
            distributed.all_reduce(samples, distributed.ReduceOp.MAX)  # the time of a round is the slowest rank's
            times = dict(zip(calls, samples.cpu().tolist(), strict=True))
            to_peer = statistics.median(ratios(times, OURS, WITH_COLLECTIVES))
            row = {"case": f"{'×'.join(map(str, shape))} {layout}", "ratio": to_peer}
            rows.append(row | {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()})
    if rank == 0:
        torch.save(rows, f"{folder}/rows")
    distributed.destroy_process_group()


def interleaved(calls: dict[str, Call], stopwatch: Callable[..., float]) -> dict[str, list[float]]:
    """Returns the seconds of each call in each round. All ranks start each call together."""
    order, shuffle = list(calls), random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in order}
    for round in range(WARM_UP + ROUNDS):
        shuffle(order)
        for name in order:
            distributed.barrier()
            seconds = stopwatch(calls[name])
            if round >= WARM_UP:
                samples[name].append(seconds)
    return samples


def measure(device: str) -> list[command.Row]:
    """One row per shape and layout: medians over the rounds."""
    if device == "cuda" and torch.cuda.device_count() < RANKS:
        raise SystemExit(f"sync.py needs {RANKS} GPUs, or --device cpu; found {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure_rank, (device, torch.get_num_threads(), folder), nprocs=RANKS)
        rows: list[command.Row] = torch.load(Path(folder) / "rows")
    return rows


def render(description: dict[str, Any], rows: list[command.Row]) -> str:
    """One line per shape and layout; the first is the one with a target."""
    target, names = rows[0], (OURS, WITH_COLLECTIVES, ALONE, BARE)
    lines = [(row["case"], *(f"{row[name]:.3g}" for name in names), f"{row['ratio']:.2f}") for row in rows]
    header = ("input on each rank", *(f"{name} ms" for name in names), f"{OURS} / {WITH_COLLECTIVES}")
    verdict = "reached" if target["ratio"] <= TARGET else "**not reached**"
    parts = [
        f"# Synchronization, {RANKS} ranks: {description.get('gpu', description['cpu'])}",
        command.versions(description),
        "Forward + backward, float32. Medians over rounds that run every call once, on all ranks together; the time of "
        "a round is the slowest rank's.",
        tables.table(header, lines, text_columns=1),
        f"Target: a ratio of at most {TARGET} for {target['case']}. Measured: {target['ratio']:.2f}, {verdict}.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(command.run(__doc__, "sync", measure, render))
