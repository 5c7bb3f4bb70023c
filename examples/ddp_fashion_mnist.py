"""The demo's network, trained by several processes as one process would train it.

    torchrun --nproc-per-node 2 examples/ddp_fashion_mnist.py --epochs 2

Each process has its share of every batch; batch norm is over the whole batch, and so is the data set's mean and
standard deviation. On GPUs where there is one for each process (nccl), else on the CPU (gloo). Without torchrun it is
the one process to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import normfused
from normfused.cli.demo.data import find_dataset
from normfused.cli.demo.experiments import cnn
from normfused.transforms import Normalize

INTERRUPTED = 130


def main() -> int:
    """Trains as the command line says; the exit code."""
    arguments = parse()
    rank, ranks, device = start()
    try:
        return train(arguments, rank, ranks, device)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def start() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device of this one."""
    local, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    on_gpus = torch.cuda.device_count() > int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    if ranks > 1:
        distributed.init_process_group("nccl" if on_gpus else "gloo")
    return int(os.environ.get("RANK", "0")), ranks, device


def train(arguments: argparse.Namespace, rank: int, ranks: int, device: torch.device) -> int:
    """Trains, saving and printing after each epoch; the exit code."""
    split = find_dataset(arguments.data).limited(arguments.limit).train
    group = distributed.group.WORLD if ranks > 1 else None
    stats = normfused.dataset_stats(split.images, layout="NCHW", process_group=group, progress=False)
    normalize = Normalize(stats.mean, stats.std)
    images, labels = normalize(split.images.to(device)), split.labels.to(device)

    torch.manual_seed(arguments.seed)
    model: nn.Module = normfused.convert_sync_batchnorm(cnn(images.shape[1:], nn)).to(device)
    network = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    curve = load(arguments.checkpoint, model, optimizer) if arguments.resume else []
    if rank == 0:
        print(f"{len(images)} images, {ranks} processes on {device.type}; mean {stats.mean}, std {stats.std}")

    interrupted = Interrupt(device)
    for epoch in range(len(curve), arguments.epochs):
        figures = torch.zeros(3, device=device, dtype=torch.float64)  # images, right answers, loss
        for batch in torch.split(torch.arange(len(images) // arguments.batch * arguments.batch), arguments.batch):
            own = batch.tensor_split(ranks)[rank].to(device)
            figures += step(network, optimizer, images[own], labels[own], ranks / len(batch))
            if interrupted.anywhere():
                if rank == 0:
                    kept = (
                        f"; {arguments.checkpoint} has the epochs before it" if arguments.checkpoint and curve else ""
                    )
                    print(f"interrupted in epoch {epoch + 1}{kept}", flush=True)
                return INTERRUPTED
        if ranks > 1:
            distributed.all_reduce(figures)
        count, right, loss = figures.tolist()
        curve.append({"accuracy": right / count, "loss": loss / count})
        if rank == 0:
            print(f"epoch {epoch + 1}: training accuracy {right / count:.4f}, loss {loss / count:.4f}", flush=True)
            save(arguments.checkpoint, model, optimizer, curve)
    if rank == 0 and arguments.json:
        arguments.json.write_text(json.dumps(curve, indent=2) + "\n")
    return 0


def step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, weight: float) -> Tensor:
    """One step; how many images it took, how many answers were right, and the sum of their losses.

    Gradients are averaged over processes, whose shares need not be equal: ``weight`` makes of the sum of this one's
    losses its part in the mean of the whole batch's.
    """
    answers = network(images)
    loss = nn.functional.cross_entropy(answers, labels, reduction="sum")
    optimizer.zero_grad()
    (loss * weight).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    right = (answers.argmax(1) == labels).sum()
    return torch.stack((torch.tensor(len(labels), device=loss.device), right, loss.detach()))


class Interrupt:
    """Ctrl-C, and torchrun's request to end, on any process: seen by all after the same step."""

    def __init__(self, device: torch.device) -> None:
        self.here = torch.zeros((), device=device)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.here.fill_(1))

    def anywhere(self) -> bool:
        """Whether any process has been asked; all are to call it together."""
        there = self.here.clone()
        if distributed.is_initialized():
            distributed.all_reduce(there)
        return bool(there)


def save(path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, curve: list[dict[str, float]]) -> None:
    """In one step: what was there stays until the new one is whole."""
    if path is not None:
        whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
        torch.save(whole, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """The curve so far."""
    whole: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(whole["model"])
    optimizer.load_state_dict(whole["optimizer"])
    curve: list[dict[str, float]] = whole["curve"]
    return curve


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1000, help="images of all processes together (default 1000)")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST; default: where normfused demo looks")
    parser.add_argument("--limit", type=int, help="train with the first so many images only")
    parser.add_argument("--seed", type=int, default=50)
    parser.add_argument("--checkpoint", type=Path, help="written after every epoch")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--json", type=Path, help="where to write the curve")
    arguments = parser.parse_args()
    if arguments.resume and not (arguments.checkpoint and arguments.checkpoint.is_file()):
        parser.error(f"--resume: there is no checkpoint {arguments.checkpoint}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
