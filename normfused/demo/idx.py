"""Reads data sets in IDX files, the format of MNIST and Fashion-MNIST.

Format: http://yann.lecun.com/exdb/mnist. Fashion-MNIST: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a
Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017,
https://arxiv.org/abs/1708.07747.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from normfused.demo.dataset import Dataset, Split
from normfused.demo.errors import DemoError

MARKER = "train-images-idx3-ubyte*"

_UNSIGNED_BYTE = 0x08


def read_dataset(folder: Path) -> Dataset:
    """The files of MNIST's names in ``folder``; those of the test split (t10k) may be missing.

    Raises:
        DemoError: a file is missing or damaged; the text names it.
    """
    has_test = any(folder.glob("t10k-images-idx3-ubyte*"))
    test = _read_split(folder, "t10k") if has_test else None
    return Dataset(_name(folder), str(folder), _read_split(folder, "train"), test)


def read_idx(path: Path, dims: int) -> Tensor:
    """The uint8 tensor of ``dims`` dimensions in an IDX file, plain or gzipped (``.gz``).

    Layout: two zero bytes, the data type (0x08: unsigned bytes), the number of dimensions, each
    size as a big-endian uint32, then the values, last dimension fastest.

    Raises:
        DemoError: the file is anything else; the text names it.
    """
    content = _read_bytes(path)
    magic = bytes((0, 0, _UNSIGNED_BYTE, dims))
    if content[:4] != magic:
        raise DemoError(
            f"{path}: not an IDX file of unsigned bytes in {dims}D: "
            f"starts with {content[:4].hex(' ') or 'nothing'}, not {magic.hex(' ')}"
        )
    header = 4 + 4 * dims
    if len(content) < header:
        raise DemoError(f"{path}: ends in its header, after {len(content)} of {header} bytes")
    sizes = struct.unpack_from(f">{dims}I", content, offset=4)
    needed, found = math.prod(sizes), len(content) - header
    if found != needed or not needed:
        raise DemoError(f"{path}: sizes {sizes} need {needed} bytes, the file holds {found}")
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).view(sizes)


def _read_bytes(path: Path) -> bytearray:
    # A bytearray, since torch warns about tensors over memory that must not be written.
    if path.suffix != ".gz":
        return bytearray(path.read_bytes())
    try:
        return bytearray(gzip.decompress(path.read_bytes()))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DemoError(f"{path}: damaged gzip file: {error}") from error


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
    """Fashion-MNIST carries MNIST's file names, so only the path can tell."""
    parts = folder.resolve().parts
    is_fashion = any(part.lower().replace("-", "") == "fashionmnist" for part in parts)
    return "Fashion-MNIST" if is_fashion else folder.resolve().name
