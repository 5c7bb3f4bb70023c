"""Array files: IDX, .npy, .npz, and the volumes of NIfTI."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from normfused.data.files import is_idx, read_idx
from normfused.data.images import guess_layout
from normfused.data.sources import Files, Image, Options, has
from normfused.errors import CommandError

_VALUES_AT_A_TIME = 1 << 24  # as float64, which a histogram needs, 128 MiB
_NUMPY, _NIFTI = (".npy", ".npz"), (".nii", ".nii.gz")
ENDINGS = (*_NUMPY, *_NIFTI)  # of array files in a folder


class Arrays:
    """Array files, each of many images or of one, read in parts of some megabytes."""

    may_use_threads = False  # parts of a compressed file are read in order

    def __init__(self, files: Files, options: Options) -> None:
        self.key, self.files = options.key, files
        # Other arrays need no decoding.
        self.may_use_workers = any(_ending(path) == ".nii.gz" for path in files.arrays)
        images_of_all = 0
        self._parts: list[tuple[Path, slice, str]] = []
        self._opened: tuple[Path, Any] | None = None
        for path in sorted(files.arrays):
            array = self._open(path)
            try:
                layout = options.layout or _own_layout(path, array) or guess_layout(array, "--layout")
                if len(layout) != array.ndim:
                    raise ValueError(f"--layout {layout} does not fit shape {tuple(array.shape)}")
            except ValueError as error:
                raise CommandError(f"{path}: {error}") from error
            images = array.shape[layout.index("N")] if "N" in layout else 1
            step = max(1, _VALUES_AT_A_TIME * images // max(1, int(np.prod(array.shape))))
            self._parts += [(path, slice(first, first + step), layout) for first in range(0, max(images, 1), step)]
            images_of_all += images
        self.images: int | None = images_of_all

    def _open(self, path: Path) -> Any:
        """The array. The last one stays open: with all of them, a process can have too many open files."""
        if self._opened is None or self._opened[0] != path:
            self._opened = path, read_array(path, self.key)
        return self._opened[1]

    def __len__(self) -> int:
        return len(self._parts)

    def read(self, index: int) -> Iterator[Image]:
        """Some images of a file."""
        path, images, layout = self._parts[index]
        array = self._open(path)
        if "N" in layout:
            array = array[(slice(None),) * layout.index("N") + (images,)]
        yield array if isinstance(array, Tensor) else np.asanyarray(array), layout

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self._parts[index][0])

    def left_out(self) -> dict[str, list[str]]:
        """Other files of a folder."""
        return self.files.left_out()


def _ending(path: Path) -> str:
    """The ending of the name in lower case, that of NIfTI also if it is compressed."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def _own_layout(path: Path, array: Any) -> str | None:
    """The layout that the format of a file defines; None for the default."""
    if _ending(path) in _NIFTI:
        return "XYZT"[: array.ndim] if array.ndim <= 4 else None
    if array.ndim != 3:
        return None
    if _ending(path) in _NUMPY:
        raise ValueError(
            f"shape {tuple(array.shape)} is --layout NHW for many grayscale images, HWC or CHW for one image, DHW for "
            "a volume"
        )
    return "NHW"  # as MNIST's files are


def is_array(path: Path) -> bool:
    """Whether a file holds an array: by its name, or the first bytes of an IDX file."""
    return _ending(path) in (*ENDINGS, ".gz") or is_idx(path)


def is_array_name(path: Path) -> bool:
    """Whether a file holds an array, by its name."""
    return _ending(path) in ENDINGS


def read_array(path: Path, key: str | None) -> Any:
    """The array in the file: a tensor, an array, or for NIfTI an object that NumPy reads slices of.

    A .npy file is memory-mapped. ``key``: its name in an .npz file.
    """
    ending = _ending(path)
    if ending != ".npz" and key is not None:
        raise CommandError(f"{path}: --key names an array of an .npz file")
    if ending in _NIFTI:
        return _read_nifti(path)
    if ending not in _NUMPY:
        return read_idx(path)
    try:
        content: Any = np.load(path, mmap_mode="r")
        if isinstance(content, np.ndarray):
            return _with_values(content)
        with content:
            names = ", ".join(content.files) or "no array"
            if key is not None and key not in content.files:
                raise ValueError(f"contains {names}, not {key}")
            if key is None and len(content.files) != 1:
                raise ValueError(f"contains {names}{': --key chooses one' if content.files else ''}")
            return _with_values(content[content.files[0] if key is None else key])
    except Exception as error:  # a damaged file can raise almost anything
        if _names_a_file(error):
            raise
        raise CommandError(f"{path}: {str(error) or repr(error)}") from error


def _with_values(array: np.ndarray) -> np.ndarray:
    # A file of a hundred bytes can hold 2^62 values of no bytes.
    if array.dtype.itemsize == 0:
        raise ValueError(f"values of dtype {array.dtype}, which have no bytes")
    return array


def _names_a_file(error: Exception) -> bool:
    """Whether an error is one of the operating system, whose message names the file. Decoders raise OSError too."""
    return isinstance(error, OSError) and error.filename is not None


def _read_nifti(path: Path) -> Any:
    """The values of a volume, with the slope and intercept of its header if it has them."""
    if not has("nibabel"):
        raise CommandError(f"{path}: nibabel not installed: pip install 'normfused[volumes]'")
    import nibabel

    try:
        volume: Any = nibabel.load(path)
    except Exception as error:  # a damaged file can raise almost anything
        if _names_a_file(error):
            raise
        raise CommandError(f"{path}: {str(error) or repr(error)}") from error
    return volume.dataobj
