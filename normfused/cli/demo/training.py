"""Trains one run after another on the same batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from normfused.cli.demo.dataset import Dataset, Split, Standardization
from normfused.cli.demo.experiments import Experiment, Run
from normfused.conversion import bytes_saved_for_backward

_BAR_UPDATES_PER_EPOCH = 60  # each waits for the device
_EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Training:
    """The settings that the runs of an experiment share."""

    experiment: Experiment
    dataset: Dataset
    standardization: Standardization
    epochs: int
    seed: int
    device: torch.device
    batch_size: int
    shuffle: bool

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches. An incomplete last batch is dropped."""
        return len(self.dataset.train) // self.batch_size

    def __str__(self) -> str:
        """Two lines: the data and the settings."""
        dataset, experiment = self.dataset, self.experiment
        shape = "x".join(map(str, dataset.train.images.shape[1:]))
        test = f"{len(dataset.test)} to test" if dataset.test else "none to test"
        mean, std = (
            ", ".join(f"{value:.4f}" for value in values.tolist())
            for values in (self.standardization.mean, self.standardization.std)
        )
        return (
            f"{dataset.name} ({dataset.source}): {len(dataset.train)} images of {shape} to train "
            f"with, {test}; mean {mean}, std {std}\n"
            f"{experiment.name}: {self.epochs} epochs of {self.steps_per_epoch} batches of "
            f"{self.batch_size}, {'shuffled' if self.shuffle else 'in file order'}, "
            f"Adam {experiment.learning_rate:g}, seed {self.seed}, {self.device}"
        )


@dataclass(frozen=True)
class Epoch:
    """Accuracy (0 to 1) and mean loss over the batches of an epoch, and its wall time in seconds.

    Accuracy and loss of a batch are those before its optimizer step.
    """

    accuracy: float
    loss: float
    seconds: float


@dataclass(frozen=True)
class Curve:
    """The results of a run.

    ``test_accuracy`` is that of the trained network, None without a test split. ``saved_bytes`` is what a forward pass
    of one batch saves for backward.
    """

    run: str
    epochs: list[Epoch]
    test_accuracy: float | None
    saved_bytes: int


def train(run: Run, training: Training) -> Curve:
    """Train a new network.

    Initial weights and the order of batches depend on the seed only, which is set in torch's global generator. Batch
    norm draws no random numbers, so runs with and without it start with the same weights.
    """
    dataset, experiment = training.dataset, training.experiment
    shape, examples = dataset.train.images.shape[1:], _prepare(dataset.train, run, training)
    # A separate network, because the pass updates running statistics.
    measured = experiment.network(shape, run).to(training.device)
    saved_bytes = bytes_saved_for_backward(measured, examples.inputs[: training.batch_size])
    torch.manual_seed(training.seed)
    network = experiment.network(shape, run).to(training.device)
    optimizer = optim.Adam(network.parameters(), lr=experiment.learning_rate)
    steps = training.epochs * training.steps_per_epoch
    with tqdm(desc=run.name, total=steps, leave=False, disable=None) as bar:
        epochs = []
        for number, batches in enumerate(_batches(training), start=1):
            bar.set_description(f"{run.name}, epoch {number}/{training.epochs}")
            epochs.append(_train_epoch(network, optimizer, examples, batches, bar))
    test_accuracy = None
    if dataset.test:
        test_accuracy = accuracy(network, _prepare(dataset.test, run, training))
    return Curve(run.name, epochs, test_accuracy, saved_bytes)


class Examples(NamedTuple):
    """A split on the device, with float32 images."""

    inputs: Tensor
    labels: Tensor


def _prepare(split: Split, run: Run, training: Training) -> Examples:
    images, white = split.images.to(training.device), training.dataset.white
    inputs = training.standardization.apply(images, white) if run.standardized else images.float().div_(white)
    return Examples(inputs, split.labels.to(training.device))


def _batches(training: Training) -> Iterator[Tensor]:
    """For each epoch the indices of its images, shape (steps, batch size)."""
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.arange(len(training.dataset.train))
    steps, batch_size = training.steps_per_epoch, training.batch_size
    for _ in range(training.epochs):
        if training.shuffle:
            order = torch.randperm(len(order), generator=generator)
        yield order[: steps * batch_size].view(steps, batch_size).to(training.device)


def _train_epoch(
    network: nn.Module, optimizer: optim.Optimizer, examples: Examples, batches: Tensor, bar: tqdm
) -> Epoch:
    steps, batch_size = batches.shape
    correct = torch.zeros((), dtype=torch.int64, device=batches.device)
    loss_sum = torch.zeros((), device=batches.device)
    start = time.perf_counter()
    for step, batch in enumerate(batches, start=1):
        labels = examples.labels[batch]
        predictions = network(examples.inputs[batch])
        loss = cross_entropy(predictions, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        correct += predictions.argmax(dim=1).eq(labels).sum()
        loss_sum += loss.detach()
        bar.update()
        if step % max(1, steps // _BAR_UPDATES_PER_EPOCH) == 0:
            bar.set_postfix(
                accuracy=correct.item() / (step * batch_size),
                loss=loss_sum.item() / step,
                refresh=False,
            )
    means = correct.item() / (steps * batch_size), loss_sum.item() / steps
    return Epoch(*means, seconds=time.perf_counter() - start)


@torch.no_grad()
def accuracy(network: nn.Module, examples: Examples) -> float:
    """The accuracy of the network in evaluation mode. Sets the mode."""
    network.eval()
    batches = zip(*(torch.split(tensor, _EVALUATION_BATCH) for tensor in examples), strict=True)
    correct = sum(int(network(inputs).argmax(dim=1).eq(labels).sum()) for inputs, labels in batches)
    return correct / len(examples.labels)
