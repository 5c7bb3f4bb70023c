"""Files of any bytes: a reader returns what NumPy or Pillow reads from them, or raises an error that names the file."""

from __future__ import annotations

import gzip
import io
import json
import math
import random
import re
import struct
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from normfused import ChannelStats
from normfused.data.arrays import read_array
from normfused.data.paths import open_source
from normfused.data.sources import Options
from normfused.errors import CommandError

IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PIXELS = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
_MODES = ("L", "RGB", "RGBA")  # of Pillow's, that are read as they are


# --- valid files -------------------------------------------------------------------------------


def _idx(kind: int) -> bytes:
    values = _PIXELS.astype(IDX_TYPES[kind])
    return bytes((0, 0, kind, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _npz(method: int, *names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in names:
            archive.writestr(f"{name}.npy", _npy(_PIXELS))
    return file.getvalue()


def _stats() -> list[bytes]:
    integers = ChannelStats(quantiles=(0.5,)).update(_PIXELS, weights=[0.3])
    floats = ChannelStats(scale=0.5, nodata=7.0).update(torch.arange(12.0).reshape(1, 3, 4))
    both = ChannelStats().update(_PIXELS).update(_PIXELS / 3)
    return [json.dumps(stats.to_dict()).encode() for stats in (integers, floats, both, ChannelStats())]


def _picture(form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(_PIXELS).save(file, form, **options)
    return file.getvalue()


SEEDS: dict[str, list[bytes]] = {
    "idx": [_idx(kind) for kind in IDX_TYPES],
    "gz": [gzip.compress(_idx(0x08), mtime=0), gzip.compress(_idx(0x0E), mtime=0)],
    "npy": [_npy(_PIXELS), _npy(_PIXELS.astype(">f4")), _npy(np.asfortranarray(_PIXELS[..., 0])), _npy(np.float64(1))],
    "npz": [_npz(method, "x") for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)]
    + [_npz(zipfile.ZIP_STORED, "x", "y")],
    "json": _stats(),
    "png": [_picture("PNG"), _picture("BMP"), _picture("GIF"), _picture("PPM"), _picture("JPEG")],
    "tif": [_picture("TIFF"), _picture("TIFF", save_all=True, append_images=[Image.new("L", (3, 2))])],
}


# --- mutations ---------------------------------------------------------------------------------

_NUMBERS = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
_TEXTS = (b"0", b"-1", b"NaN", b"1e999", b"1e99999999", b"null", b"true", b'"1/0"', b"[]", b"{}", b"9" * 30)


def mutate(source: random.Random, seeds: list[bytes]) -> bytes:
    """A valid file with a few changes."""
    content = bytearray(source.choice(seeds))
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(content) + 1)
        kind = source.randrange(8)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << source.randrange(8)
        elif kind == 1:
            size = source.choice((1, 2, 4, 8))
            number = source.choice(_NUMBERS) % 2 ** (8 * size)
            content[place : place + size] = number.to_bytes(size, source.choice(("little", "big")))
        elif kind == 2:
            del content[place:]
        elif kind == 3:
            del content[place : place + source.randint(1, 16)]
        elif kind == 4:
            content[place:place] = content[source.randrange(len(content) + 1) :][: source.randint(1, 64)]
        elif kind == 5:
            content[place:] = source.choice(seeds)[place:]
        elif (numbers := list(re.finditer(rb"-?\d+(\.\d+)?(e-?\d+)?|null|true", content))) and kind == 6:
            number = source.choice(numbers)
            content[number.start() : number.end()] = source.choice(_TEXTS)
        else:
            content[place:place] = source.randbytes(source.randint(1, 8))
    return bytes(content)


# --- what the readers must do -------------------------------------------------------------------


def _same(got: Any, want: np.ndarray) -> bool:
    array = got.numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    return array.shape == want.shape and array.dtype == want.dtype and array.tobytes() == want.tobytes()


def _check(read: Callable[[], Any], want: np.ndarray | None, path: Path) -> None:
    """`want` None: there is no array in the file."""
    refused = None
    try:
        got = read()
    except CommandError as error:
        refused = str(error)
    if refused is not None:
        assert str(path) in refused, f"does not name the file: {refused}"
        assert want is None, f"refused: {refused}"
    else:
        assert want is not None, f"read {got!r}, which is not in the file"
        assert _same(got, want), f"read {got!r} instead of {want!r}"


def _idx_values(content: bytes) -> np.ndarray | None:
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        return None
    header, dtype = 4 + 4 * content[3], np.dtype(IDX_TYPES[content[2]])
    if len(content) < header or content[3] > 32:
        return None
    sizes = struct.unpack(f">{content[3]}I", content[4:header])
    if math.prod(sizes) * dtype.itemsize != len(content) - header or 0 in sizes:
        return None
    return np.frombuffer(content[header:], dtype).reshape(sizes).astype(dtype.newbyteorder("="))


def _unzipped(content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except Exception:  # the reason does not matter
        return b""


def _numpy_values(path: Path) -> np.ndarray | None:
    """What NumPy reads without mapping the file."""
    try:
        content = np.load(path)
        if isinstance(content, np.ndarray):
            array: np.ndarray = content
        else:
            (name,) = content.files
            array = content[name]
    except Exception:  # the reason does not matter
        return None
    return array if array.dtype.itemsize else None


def _check_json(path: Path, content: bytes) -> None:
    refused = None
    try:
        stats = ChannelStats.load(path)
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        assert str(path) in refused, f"does not name the file: {refused}"
        return

    def exact(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: exact(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [exact(item) for item in value]
        return Fraction(value) if isinstance(value, str) else value

    figures = json.loads(content)
    figures = figures.get("stats", figures)
    written = stats.to_dict()
    assert exact(written) == exact({key: figures[key] for key in written}), "other figures than those of the file"
    assert str(stats)
    stats.save(path)
    assert ChannelStats.load(path) == stats


def _check_picture(path: Path) -> None:
    """Only the caller knows the part, and so adds the name of the file to the errors of a picture."""
    source = open_source([path], Options(max_pixels=1 << 20, frames="first"))
    try:
        ((got, _),) = source.read(0)
    except Exception:  # of any type
        return
    try:
        with Image.open(path) as image:
            want = np.array(image) if image.mode in _MODES else None
    except UnidentifiedImageError:
        assert path.suffix == ".tif"  # tifffile reads more of them
        return
    assert want is None or _same(got, want), f"read {got!r}"


def check(kind: str, path: Path, content: bytes) -> None:
    """Reads a file of a kind of SEEDS. Raises AssertionError for a wrong result, or an error that is not documented."""
    path.write_bytes(content)
    if kind in ("idx", "gz"):
        _check(lambda: read_array(path, None), _idx_values(content if kind == "idx" else _unzipped(content)), path)
    elif kind in ("npy", "npz"):
        _check(lambda: read_array(path, None), _numpy_values(path), path)
    elif kind == "json":
        _check_json(path, content)
    else:
        _check_picture(path)
