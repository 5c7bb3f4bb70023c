"""Reads data sets in IDX files, the format of MNIST and Fashion-MNIST.

Fashion-MNIST: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking
Machine Learning Algorithms", 2017, https://arxiv.org/abs/1708.07747.
"""

from __future__ import annotations

from pathlib import Path

from normfused.cli.demo.dataset import Dataset, Split
from normfused.cli.demo.errors import DemoError
from normfused.data.files import read_idx

MARKER = "train-images-idx3-ubyte*"


def read_dataset(folder: Path) -> Dataset:
    """The data set in ``folder``, in files with the names of MNIST's. The test split (t10k) may be missing.

    Raises:
        CommandError: a file is missing or damaged; the message names it.
    """
    has_test = any(folder.glob("t10k-images-idx3-ubyte*"))
    test = _read_split(folder, "t10k") if has_test else None
    return Dataset(_name(folder), str(folder), _read_split(folder, "train"), test)


def _read_split(folder: Path, prefix: str) -> Split:
    images = _plain_or_gz(folder / f"{prefix}-images-idx3-ubyte")
    labels = _plain_or_gz(folder / f"{prefix}-labels-idx1-ubyte")
    return Split.checked(read_idx(images, 3).unsqueeze(1), read_idx(labels, 1), labels)


def _plain_or_gz(path: Path) -> Path:
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    raise DemoError(f"{path}: no such file, neither plain nor with .gz")


def _name(folder: Path) -> str:
    """The name of the data set, from the path: Fashion-MNIST has the file names of MNIST."""
    parts = folder.resolve().parts
    is_fashion = any(part.lower().replace("-", "") == "fashionmnist" for part in parts)
    return "Fashion-MNIST" if is_fashion else folder.resolve().name
