"""Sources of images: picture files, or an array in an IDX, .npy or .npz file."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from normfused.data.files import IDX_START, read_idx
from normfused.data.images import guess_layout
from normfused.errors import CommandError

# Pillow's modes for --channels, and for modes whose values are not colors: palette indices and single bits.
_MODES = {"gray": "L", "rgb": "RGB", "P": "RGB", "PA": "RGB", "1": "L"}
_VALUES_AT_A_TIME = 1 << 24  # as float64, which a histogram needs, 128 MiB


class Source(Protocol):
    """Images, read in parts."""

    layout: str | None  # layout of a part; None: the default
    images: int

    def __len__(self) -> int:
        """Number of parts."""

    def __getitem__(self, index: int) -> Tensor | np.ndarray:
        """A part. Raises the errors of a damaged file, of any type."""

    def name(self, index: int) -> str:
        """The name of a part in errors."""

    def left_out(self) -> dict[str, list[str]]:
        """Paths that are not read, by the reason."""


@dataclass
class Files:
    """The files of a folder, links followed."""

    # Files to read. Also links to nothing and folders that cannot be listed, whose reading fails with the reason.
    pictures: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)  # no pictures, by their names
    subfolders: list[Path] = field(default_factory=list)  # not searched

    def left_out(self) -> dict[str, list[str]]:
        """The paths that are not read, by the reason."""
        reasons = {
            "not a picture by its name": self.others,
            "subfolder, which --recursive searches": self.subfolders,
        }
        return {reason: [str(path) for path in sorted(paths)] for reason, paths in reasons.items() if paths}


class Pictures:
    """Picture files, one at a time.

    ``frames``: ``"first"`` or ``"all"`` of the pages of a TIFF or the frames of an animation. None: more than one are
    an error. Of the pictures of a phone's MPO file, the first is the photograph.
    """

    def __init__(self, files: Files, channels: str | None, frames: str | None = None) -> None:
        self.files, self.channels, self.frames = files, channels, frames
        self.layout = "NHWC" if frames == "all" else None
        self.paths = sorted(files.pictures)
        self.images = len(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        from PIL import Image

        path = self.paths[index]
        if path.is_dir():
            os.listdir(path)  # raises the error that `find_files` met
        with Image.open(path) as file:
            if self.frames == "first":  # without counting them, for which Pillow reads the whole file
                return self._pixels(file)
            count = getattr(file, "n_frames", 1) if file.format != "MPO" else 1
            if self.frames is None:
                if count > 1:
                    raise ValueError(f"{count} frames or pages: --frames first or --frames all")
                return self._pixels(file)
            frames = []
            for number in range(count):
                file.seek(number)
                frames.append(np.atleast_3d(self._pixels(file)))
            shapes = {frame.shape for frame in frames}
            if len(shapes) > 1:
                raise ValueError(f"{count} frames or pages of different shapes: {', '.join(map(str, sorted(shapes)))}")
            return np.stack(frames)

    def _pixels(self, file: Any) -> np.ndarray:
        """The current frame, as an array of shape (H, W) or (H, W, C)."""
        if changes := _changes(file):
            raise ValueError(f"{changes}; an .npy file can hold it")
        image = file
        if image.mode.startswith(("I", "F")):  # gray with more than 8 bits, to which Pillow clips
            if self.channels == "rgb":
                raise ValueError(f"Pillow cannot convert mode {image.mode} to RGB")
            return np.array(image)
        mode = self.channels or image.mode
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # Pillow warns of transparency if converted to RGB directly
        return np.array(image.convert(_MODES.get(mode, mode)))

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.paths[index])

    def left_out(self) -> dict[str, list[str]]:
        """Files that are no pictures, and subfolders."""
        return self.files.left_out()


# Tags of a TIFF file.
_BITS, _SAMPLES, _FORMAT = 258, 277, 339
_FORMATS = {1: "unsigned", 2: "signed", 3: "floating"}
# Bits and format of the samples that a mode of Pillow's holds unchanged, or scaled to 0..255 if they have fewer bits.
_EIGHT_BITS = {(bits, 1) for bits in (1, 2, 4, 8)}
_WIDE = {"I;16": {(16, 1)}, "I": {(16, 2), (32, 2)}, "F": {(32, 3)}}


def _changes(file: Any) -> str:
    """What Pillow changes in the values of an opened file; empty if it reads what the file says."""
    mode = file.mode.removesuffix("B")  # I;16B: the same in another byte order
    if file.format == "TIFF":
        tags = file.tag_v2
        samples, formats = tags.get(_SAMPLES, 1), tags.get(_FORMAT, (1,))
        stored = {(bits, formats[0]) for bits in tags.get(_BITS, (1,))}
        if samples != len(file.getbands()) or len(set(formats)) > 1 or not stored <= _WIDE.get(mode, _EIGHT_BITS):
            kinds = " and ".join(f"{bits}-bit {_FORMATS.get(kind, 'other')}" for bits, kind in sorted(stored))
            return f"{samples} samples per pixel, {kinds}, which Pillow reads as mode {file.mode}"
    elif mode not in _WIDE and any(_is_deep(codec, arguments) for codec, _, _, arguments in file.tile):
        return f"16 bits per sample, of which Pillow keeps 8 in mode {file.mode}"
    return ""


def _is_deep(codec: str, arguments: Any) -> bool:
    """Whether a decoder reads more than 8 bits per sample: its raw mode says so, or the maximum of a PPM."""
    raw_mode, *rest = arguments if isinstance(arguments, tuple) else (arguments,)
    return ";16" in str(raw_mode) or (codec.startswith("ppm") and any(value > 255 for value in rest))


class Stack:
    """An array of images, or of one image, read in parts of some megabytes."""

    def __init__(self, path: Path, array: Tensor | np.ndarray, layout: str | None) -> None:
        layout = layout or guess_layout(array)
        if not layout.startswith("N"):
            array, layout = array[None], f"N{layout}"
        self.path, self.array = path, array
        self.layout: str | None = layout
        self.images = len(array)
        self.step = max(1, _VALUES_AT_A_TIME * len(array) // max(1, int(np.prod(array.shape))))

    def __len__(self) -> int:
        return -(-self.images // self.step)

    def __getitem__(self, index: int) -> Tensor | np.ndarray:
        return self.array[index * self.step : (index + 1) * self.step]

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.path)

    def left_out(self) -> dict[str, list[str]]:
        """Nothing."""
        return {}


def open_source(
    path: Path, layout: str | None, channels: str | None, recursive: bool, frames: str | None = None
) -> Source:
    """The images in a file or folder.

    Raises:
        CommandError, OSError: no images, or an option that does not apply to them; the message names ``path``.
    """
    array = None if path.is_dir() else _read_array(path)
    if array is None:
        if layout is not None:
            raise CommandError("--layout applies to arrays; a picture file defines its own layout")
        if importlib.util.find_spec("PIL") is None:
            raise CommandError("pillow not installed: pip install 'normfused[data]'")
        return Pictures(_picture_files(path, recursive) if path.is_dir() else Files([path]), channels, frames)
    for option, value in (("--channels", channels), ("--frames", frames)):
        if value is not None:
            raise CommandError(f"{option} applies to pictures, but {path} contains an array")
    try:
        return Stack(path, array, layout or _stack_layout(path, array))
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from error


def _picture_files(folder: Path, recursive: bool) -> Files:
    from PIL import Image

    endings = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
    files = find_files(folder, endings, recursive)
    if not files.pictures:
        hint = f"; --recursive searches its subfolders ({len(files.subfolders)})" if files.subfolders else ""
        raise CommandError(f"{folder}: no picture files{hint}")
    return files


def find_files(folder: Path, endings: set[str], recursive: bool) -> Files:
    """The files of a folder, and with ``recursive`` of all folders below it.

    Links to folders are followed, but not into a folder that contains the link. A file is a picture if its name has one
    of the ``endings``.
    """
    files = Files()

    def search(folder: Path, parents: tuple[tuple[int, int], ...]) -> None:
        try:
            status = folder.stat()
            entries = list(os.scandir(folder))
        except OSError:
            files.pictures.append(folder)
            return
        identity = status.st_dev, status.st_ino
        if identity in parents:
            return
        for entry in entries:
            path = folder / entry.name
            if not _is_folder(entry):
                (files.pictures if path.suffix.lower() in endings else files.others).append(path)
            elif recursive:
                search(path, (*parents, identity))
            else:
                files.subfolders.append(path)

    search(folder, ())
    return files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _stack_layout(path: Path, array: Tensor | np.ndarray) -> str | None:
    if array.ndim != 3:
        return None
    if path.suffix in (".npy", ".npz"):
        raise ValueError(
            f"shape {tuple(array.shape)} is --layout NHW for many grayscale images, HWC or CHW for one image"
        )
    return "NHW"  # as MNIST's files are


def _read_array(path: Path) -> Tensor | np.ndarray | None:
    """The array in the file, a .npy file memory-mapped; None for other files."""
    if path.suffix in (".npy", ".npz"):
        return _read_numpy(path)
    with path.open("rb") as file:
        is_idx = path.suffix == ".gz" or file.read(len(IDX_START)) == IDX_START
    return read_idx(path) if is_idx else None


def _read_numpy(path: Path) -> np.ndarray:
    try:
        content: Any = np.load(path, mmap_mode="r")
        if isinstance(content, np.ndarray):
            return content
        with content:
            if len(content.files) != 1:
                raise ValueError(f"must contain one array, has {', '.join(content.files) or 'none'}")
            array: np.ndarray = content[content.files[0]]
            return array
    except OSError:
        raise  # its message names the file
    except Exception as error:  # a damaged file can raise almost anything
        raise CommandError(f"{path}: {error}") from error
