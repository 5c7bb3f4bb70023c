"""IDX files, and files that are written in one step."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from normfused.errors import CommandError

_UNSIGNED_BYTE = 0x08
IDX_START = bytes((0, 0, _UNSIGNED_BYTE))


def read_idx(path: Path, dims: int | None = None) -> Tensor:
    """Read a uint8 tensor from an IDX file, plain or gzipped (``.gz``), the format of MNIST.

    The format: two zero bytes, the data type (0x08: unsigned bytes), the number of dimensions, each size as a
    big-endian uint32, then the values, last dimension fastest.

    Args:
        path: the file.
        dims: required number of dimensions; ``None``: any.

    Raises:
        CommandError: another format, or a damaged file; the message names the file.
        OSError: the file cannot be read.

    Source: http://yann.lecun.com/exdb/mnist.
    """
    content = _read_bytes(path)
    start = IDX_START if dims is None else IDX_START + bytes((dims,))
    if len(content) < 4 or not content.startswith(start):
        required = "" if dims is None else f" in {dims}D"
        raise CommandError(
            f"{path}: not an IDX file of unsigned bytes{required}: "
            f"starts with {content[:4].hex(' ') or 'nothing'}, not {start.hex(' ')}"
        )
    dims = content[3]
    header = 4 + 4 * dims
    if len(content) < header:
        raise CommandError(f"{path}: ends in its header, after {len(content)} of {header} bytes")
    sizes = struct.unpack_from(f">{dims}I", content, offset=4)
    needed, found = math.prod(sizes), len(content) - header
    if found != needed or not needed:
        raise CommandError(f"{path}: sizes {sizes} need {needed} bytes, the file has {found}")
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).view(sizes)


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
