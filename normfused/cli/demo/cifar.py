"""Reads CIFAR-10 as published: the "python" version (pickles) and the "binary" one.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normfused.cli.demo.dataset import Dataset, Split
from normfused.cli.demo.errors import DemoError

PYTHON_MARKER = "data_batch_1"
BINARY_MARKER = "data_batch_1.bin"

_SHAPE = (3, 32, 32)
_PIXELS = math.prod(_SHAPE)


def read_python_version(folder: Path) -> Dataset:
    """The pickles data_batch_1 to data_batch_5, and test_batch if it exists.

    Raises:
        DemoError, OSError: a file is damaged or missing; the message names it.
    """
    return _read_dataset(folder, "", read_pickle)


def read_binary_version(folder: Path) -> Dataset:
    """The files data_batch_1.bin to data_batch_5.bin, and test_batch.bin if it exists.

    Raises:
        DemoError, OSError: a file is damaged or missing; the message names it.
    """
    return _read_dataset(folder, ".bin", read_records)


def read_records(path: Path) -> Split:
    """Records of one label byte and 3 x 32 x 32 pixels."""
    content = bytearray(path.read_bytes())
    if not content or len(content) % (1 + _PIXELS):
        raise DemoError(f"{path}: {len(content)} bytes are not a multiple of the record size of {1 + _PIXELS} bytes")
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, 1 + _PIXELS)
    return Split.checked(records[:, 1:].reshape(-1, *_SHAPE), records[:, 0], path)


def read_pickle(path: Path) -> Split:
    """A dict of b"data", a uint8 array (N, 3072), and b"labels", a list of N integers."""
    batch = load_arrays(path)
    try:
        pixels, labels = batch[b"data"], torch.tensor(batch[b"labels"])
        images = torch.from_numpy(pixels).view(-1, *_SHAPE)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DemoError(f"{path}: not a CIFAR-10 batch: {error!r}") from error
    if images.dtype != torch.uint8 or labels.dtype != torch.int64:
        raise DemoError(f"{path}: not a CIFAR-10 batch: data of {images.dtype}, labels of {labels.dtype}")
    return Split.checked(images, labels, path)


def load_arrays(path: Path) -> Any:
    """Unpickle containers, numbers, strings and NumPy arrays; byte strings stay bytes.

    ``pickle.load`` would call any function that the file names. Here only the functions that rebuild an array can be
    called.

    Raises:
        DemoError: the file names other functions, or is damaged.
    """
    content = path.read_bytes()
    try:
        return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise almost anything
        raise DemoError(f"{path}: {error or repr(error)}") from error


_reconstruct = np.empty(0).__reduce__()[0]
_ARRAY_PARTS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # NumPy 2 renamed the module; the published files were written by NumPy 1.
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}: only arrays and plain containers are read")
        return _ARRAY_PARTS[module, name]


def _read_dataset(folder: Path, suffix: str, read: Callable[[Path], Split]) -> Dataset:
    batches = [read(folder / f"data_batch_{number}{suffix}") for number in range(1, 6)]
    train = Split(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
    )
    test = folder / f"test_batch{suffix}"
    return Dataset("CIFAR-10", str(folder), train, read(test) if test.is_file() else None)
