"""IDX files, and files that are written in one step."""

from __future__ import annotations

import gzip
import json
import math
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfused.errors import CommandError

_UNSIGNED_BYTE = 0x08
_IDX_DTYPES = {_UNSIGNED_BYTE: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_DIMS = 32  # of NumPy 1; 64 of NumPy 2


def is_idx(path: Path) -> bool:
    """Whether a file begins as an IDX file does."""
    with path.open("rb") as file:
        start = file.read(4)
    return len(start) == 4 and start[:2] == b"\0\0" and start[2] in _IDX_DTYPES and start[3] > 0


def read_idx(path: Path, dims: int | None = None) -> Tensor:
    """Read a tensor from an IDX file, plain or gzipped (``.gz``), the format of MNIST.

    The format: two zero bytes, the data type (0x08: unsigned bytes), the number of dimensions, each size as a
    big-endian uint32, then the values, big-endian, last dimension fastest.

    Args:
        path: the file.
        dims: required number of dimensions, of unsigned bytes; ``None``: any, of any data type.

    Raises:
        CommandError: another format, or a damaged file; the message names the file.
        OSError: the file cannot be read.

    Source: http://yann.lecun.com/exdb/mnist.
    """
    content = _read_bytes(path)
    kind = content[2] if len(content) >= 4 and content[:2] == b"\0\0" else None
    if kind not in _IDX_DTYPES or (dims is not None and (kind, dims) != (_UNSIGNED_BYTE, content[3])):
        required = "" if dims is None else f" of unsigned bytes in {dims}D"
        start = "00 00" if dims is None else bytes((0, 0, _UNSIGNED_BYTE, dims)).hex(" ")
        raise CommandError(
            f"{path}: not an IDX file{required}: starts with {content[:4].hex(' ') or 'nothing'}, not {start}"
        )
    dtype = np.dtype(_IDX_DTYPES[kind])
    dims = content[3]
    header = 4 + 4 * dims
    if len(content) < header:
        raise CommandError(f"{path}: ends in its header, after {len(content)} of {header} bytes")
    sizes = struct.unpack_from(f">{dims}I", content, offset=4)
    needed, found = math.prod(sizes) * dtype.itemsize, len(content) - header
    if found != needed or not needed:
        raise CommandError(f"{path}: sizes {sizes} need {needed} bytes, the file has {found}")
    if dims > _MAX_DIMS:
        raise CommandError(f"{path}: {dims} dimensions, more than the {_MAX_DIMS} of an array")
    values = np.frombuffer(content, dtype, offset=header).reshape(sizes)
    return torch.from_numpy(values.astype(dtype.newbyteorder("="), copy=False))


def _read_bytes(path: Path) -> bytearray:
    # A bytearray, because torch warns about tensors over read-only memory.
    if path.suffix != ".gz":
        return bytearray(path.read_bytes())
    try:
        return bytearray(gzip.decompress(path.read_bytes()))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CommandError(f"{path}: damaged gzip file: {error}") from error


def replace(path: Path, content: bytes) -> None:
    """Write a file in one step: an interruption leaves the former file as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def as_json(content: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """JSON with lists of numbers on one line. ``default`` is that of :func:`json.dumps`.

    Raises:
        ValueError: NaN or infinity.
    """
    text = json.dumps(content, indent=2, default=default, allow_nan=False)
    # Strings contain no line breaks, so what matches is a list.
    return re.sub(r"\[\n[-+.,\de\s]*\]", lambda match: f"[{' '.join(match[0][1:-1].split())}]", text).encode() + b"\n"
