"""Finds the data of the demo on disk. It downloads nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from normfused.cli.demo import cifar, idx
from normfused.cli.demo.dataset import Dataset, Split
from normfused.cli.demo.errors import DemoError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
TORCHVISION_FOLDER = Path("FashionMNIST", "raw")
HOW_TO_INSTALL = "apt install dataset-fashion-mnist"

_DIGITS_TO_TRAIN_WITH = 1500


@dataclass(frozen=True)
class _Format:
    """A data set format. A folder has it if the glob pattern ``marker`` matches a file in the folder."""

    marker: str
    read: Callable[[Path], Dataset]


_FORMATS = (
    _Format(idx.MARKER, idx.read_dataset),
    _Format(cifar.PYTHON_MARKER, cifar.read_python_version),
    _Format(cifar.BINARY_MARKER, cifar.read_binary_version),
)


def find_dataset(root: Path | None) -> Dataset:
    """The data set in ``root``, in any of the three formats, or in the subfolder that its archive unpacks to.

    Without ``root``: Fashion-MNIST from the Debian package or from the torchvision root ``./data``; if neither exists,
    scikit-learn's digits.

    Raises:
        CommandError: ``root`` has no data, or a file is damaged; the message names it.
        OSError: a file cannot be read.
    """
    if root is None:
        usual = (DEBIAN_FOLDER, Path("data") / TORCHVISION_FOLDER)
        return _first_in(usual) or _read_digits(
            f"scikit-learn, as Fashion-MNIST is neither in {usual[0]} ({HOW_TO_INSTALL}) nor in {usual[1]}"
        )
    folders = (
        root,
        root / TORCHVISION_FOLDER,
        root / "cifar-10-batches-py",
        root / "cifar-10-batches-bin",
    )
    dataset = _first_in(folders)
    if dataset is None:
        raise DemoError(
            f"no IDX files and no CIFAR-10 in {', '.join(map(str, folders))}; name another folder, "
            f"or leave --data out ({HOW_TO_INSTALL} for Fashion-MNIST, else scikit-learn's digits)"
        )
    return dataset


def _first_in(folders: Sequence[Path]) -> Dataset | None:
    for folder in folders:
        for file_format in _FORMATS:
            if any(folder.glob(file_format.marker)):
                return file_format.read(folder)
    return None


def _read_digits(source: str) -> Dataset:
    """1,797 digits of 8 x 8 pixels in 0..16: the first 1,500 for training, the rest for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    whole = Split(images, torch.from_numpy(digits.target))
    cut = _DIGITS_TO_TRAIN_WITH
    test = Split(whole.images[cut:], whole.labels[cut:])
    return Dataset("digits", source, whole.first(cut), test, white=16)
