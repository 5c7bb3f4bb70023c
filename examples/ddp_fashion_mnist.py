"""Trains the demo's network with DistributedDataParallel and SyncBatchNorm.

    torchrun --nproc-per-node 2 examples/ddp_fashion_mnist.py --epochs 2

Each process computes its part of every batch, and batch norm uses the statistics of the whole batch. So training is
equivalent to training in one process, up to rounding. It runs on GPUs (nccl) if there is one per process, and on the
CPU (gloo) otherwise. Without torchrun it trains in one process, for comparison.
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

INTERRUPTED = 130  # exit code after SIGINT, by the shell's convention


def main() -> int:
    """Trains as the command line requests, and returns the exit code."""
    arguments = parse()
    rank, ranks, device = start()
    try:
        return train(arguments, rank, ranks, device)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def start() -> tuple[int, int, torch.device]:
    """Initializes the process group. Returns rank, number of processes and device of this process."""
    local_rank, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    use_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", local_rank) if use_gpus else torch.device("cpu")
    if use_gpus:
        torch.cuda.set_device(device)
    if ranks > 1:
        distributed.init_process_group("nccl" if use_gpus else "gloo")
    return int(os.environ.get("RANK", "0")), ranks, device


def train(arguments: argparse.Namespace, rank: int, ranks: int, device: torch.device) -> int:
    """Trains, prints and saves after each epoch, and returns the exit code."""
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
        sums = torch.zeros(3, device=device, dtype=torch.float64)  # images, correct predictions, loss
        for batch in torch.split(torch.arange(len(images) // arguments.batch * arguments.batch), arguments.batch):
            indices = batch.tensor_split(ranks)[rank].to(device)
            sums += step(network, optimizer, images[indices], labels[indices], ranks / len(batch))
            if interrupted.on_any_rank():
                if rank == 0:
                    checkpoint = arguments.checkpoint if curve else None
                    saved = f"; {checkpoint} has the epochs before it" if checkpoint else ""
                    print(f"interrupted in epoch {epoch + 1}{saved}", flush=True)
                return INTERRUPTED
        if ranks > 1:
            distributed.all_reduce(sums)
        count, correct, loss = sums.tolist()
        curve.append({"accuracy": correct / count, "loss": loss / count})
        if rank == 0:
            print(f"epoch {epoch + 1}: training accuracy {correct / count:.4f}, loss {loss / count:.4f}", flush=True)
            save(arguments.checkpoint, model, optimizer, curve)
    if rank == 0 and arguments.json:
        arguments.json.write_text(json.dumps(curve, indent=2) + "\n")
    return 0


def step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Performs one step. Returns the number of images, the number of correct predictions, and the sum of the losses.

    DistributedDataParallel averages gradients over processes, which may hold different numbers of images. ``weight``,
    the number of processes / the size of the whole batch, makes the average the gradient of the batch's mean loss.
    """
    logits = network(images)
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    optimizer.zero_grad()
    (loss * weight).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack((torch.tensor(len(labels), device=loss.device), correct, loss.detach()))


class Interrupt:
    """Handles SIGINT (Ctrl-C) and SIGTERM (from torchrun), so that all processes stop after the same step."""

    def __init__(self, device: torch.device) -> None:
        self.received = torch.zeros((), device=device)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.received.fill_(1))

    def on_any_rank(self) -> bool:
        """Whether any process has received a signal. A collective: all processes call it together."""
        received = self.received.clone()
        if distributed.is_initialized():
            distributed.all_reduce(received)
        return bool(received)


def save(path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, curve: list[dict[str, float]]) -> None:
    """Replaces the checkpoint atomically: an interruption leaves the previous one."""
    if path is not None:
        checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
        torch.save(checkpoint, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """Loads model and optimizer from a checkpoint. Returns accuracy and loss of the epochs so far."""
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    curve: list[dict[str, float]] = checkpoint["curve"]
    return curve


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1000, help="batch size over all processes (default: 1000)")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST (default: as in normfused demo)")
    parser.add_argument("--limit", type=int, help="train only on this many images")
    parser.add_argument("--seed", type=int, default=50)
    parser.add_argument("--checkpoint", type=Path, help="file to save to after every epoch")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--json", type=Path, help="file for accuracy and loss of each epoch")
    arguments = parser.parse_args()
    if arguments.resume and not (arguments.checkpoint and arguments.checkpoint.is_file()):
        parser.error(f"--resume: checkpoint not found: {arguments.checkpoint}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
