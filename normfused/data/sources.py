"""Sources of images: picture files, and arrays in IDX, .npy and .npz files."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from normfused.data.files import is_idx, read_idx
from normfused.data.images import check_layout, guess_layout
from normfused.data.stats import ChannelStats, measure
from normfused.errors import CommandError

# Pillow's modes for --channels, and for modes whose values are not colors: palette indices and single bits.
_MODES = {"gray": "L", "rgb": "RGB", "P": "RGB", "PA": "RGB", "1": "L"}
_VALUES_AT_A_TIME = 1 << 24  # as float64, which a histogram needs, 128 MiB
# Pillow logs what it raises; without a handler that is printed.
logging.getLogger("PIL").addHandler(logging.NullHandler())
MAX_PIXELS = 178_956_970  # of a picture, above which Pillow suspects a file that is made to fill the memory


@dataclass(frozen=True)
class Options:
    """How files are read.

    ``layout``, ``key``: of an array; ``key`` None: the only one of an .npz file. ``channels``: ``"gray"`` or ``"rgb"``
    that pictures are converted to; None: as stored. ``frames``: ``"first"`` or ``"all"`` of the pages of a TIFF or the
    frames of an animation; None: more than one are an error. ``recursive``: whether subfolders are searched.
    ``max_pixels``: of a picture.
    """

    layout: str | None = None
    key: str | None = None
    channels: str | None = None
    frames: str | None = None
    recursive: bool = False
    max_pixels: int = MAX_PIXELS


class Source(Protocol):
    """Images, read in parts."""

    images: int
    may_use_workers: bool

    def __len__(self) -> int:
        """Number of parts."""

    def __getitem__(self, index: int) -> tuple[Tensor | np.ndarray, str]:
        """A part and its layout. Raises the errors of a damaged file, of any type."""

    def name(self, index: int) -> str:
        """The name of a part in errors."""

    def left_out(self) -> dict[str, list[str]]:
        """Paths that are not read, by the reason."""


class _Measured(Dataset[ChannelStats | str]):
    """Of each part of the source its statistics, or why there are none."""

    def __init__(self, source: Source, like: ChannelStats) -> None:
        self.source, self.like = source, like

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> ChannelStats | str:
        try:
            return measure(*self.source[index], self.like)
        except Exception as error:  # a damaged file can raise almost anything
            return str(error) or repr(error)


def read_parts(
    source: Source, parts: range, like: ChannelStats, workers: int, failed: Callable[[int, str], None]
) -> Iterator[tuple[str, ChannelStats]]:
    """Names and statistics of these parts of the source, of those that can be read.

    ``failed`` is called with the number of each other part and the reason.
    """
    for index, part in zip(parts, load(Subset(_Measured(source, like), parts), source, workers), strict=True):
        if isinstance(part, ChannelStats):
            yield source.name(index), part
        else:
            failed(index, part)


def load(items: Dataset[Any], source: Source, workers: int) -> Iterable[Any]:
    """The items, computed by worker processes if that pays off for the source."""
    # A separate generator: DataLoader would draw a number from the default one.
    workers = workers if source.may_use_workers else 0
    return DataLoader(items, batch_size=None, num_workers=workers, generator=torch.Generator())


@dataclass
class Files:
    """The files of a folder, links followed."""

    # Files to read. Also links to nothing and folders that cannot be listed, whose reading fails with the reason.
    pictures: list[Path] = field(default_factory=list)
    arrays: list[Path] = field(default_factory=list)  # .npy and .npz
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
    """Picture files, one at a time. Of the pictures of a phone's MPO file, the first is the photograph."""

    may_use_workers = True

    def __init__(self, files: Files, options: Options) -> None:
        self.files, self.options = files, options
        self.paths = sorted(files.pictures)
        self.images = len(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        path = self.paths[index]
        if path.is_dir():
            os.listdir(path)  # raises the error that `find_files` met
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata: damaged pixels are errors
            return _read_picture(path, self.options)

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.paths[index])

    def left_out(self) -> dict[str, list[str]]:
        """Files that are no pictures, and subfolders."""
        return self.files.left_out()


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


class _ChangedError(ValueError):
    """A picture that Pillow would not read as it is stored."""


def _read_picture(path: Path, options: Options) -> tuple[np.ndarray, str]:
    """The pixels of a picture and their layout."""
    from PIL import UnidentifiedImageError

    try:
        with _opened(path, options.max_pixels) as file:
            return _select_frames(_PillowFrames(file, options), options)
    except (_ChangedError, UnidentifiedImageError) as error:
        if path.suffix.lower() not in (".tif", ".tiff"):
            raise
        if not _has("tifffile"):
            raise ValueError(f"{error}; tifffile reads it: pip install 'normfused[data]'") from error
        if options.channels is not None:
            raise ValueError(f"{error}; --channels cannot convert it") from error
        return _select_frames(_TiffPages(path, options), options)


def _opened(path: Path, max_pixels: int) -> Any:
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # Pillow's own limit
    try:
        file = Image.open(path)
    finally:
        Image.MAX_IMAGE_PIXELS = before
    try:
        _check_size(file.width, file.height, max_pixels)
    except ValueError:
        file.close()
        raise
    return file


def _check_size(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        pixels = f"{width} x {height} = {width * height:,} pixels"
        raise ValueError(f"{pixels}, more than {limit:,}: --max-pixels sets the limit")


class _Frames(Protocol):
    """The frames of a picture file."""

    def count(self) -> int:
        """Number of frames."""

    def read(self, number: int) -> np.ndarray:
        """A frame, of shape (H, W) or (H, W, C)."""


def _select_frames(frames: _Frames, options: Options) -> tuple[np.ndarray, str]:
    """The frames that the options select, and their layout."""
    # The first is read without counting, for which Pillow reads the whole file.
    count = 1 if options.frames == "first" else frames.count()
    if count > 1 and options.frames is None:
        raise ValueError(f"{count} frames or pages: --frames first or --frames all")
    if options.frames != "all":
        pixels = frames.read(0)
        return pixels, "HWC"[: pixels.ndim]
    arrays = [np.atleast_3d(frames.read(number)) for number in range(count)]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"{count} frames or pages of different shapes: {', '.join(map(str, sorted(shapes)))}")
    dtypes = {array.dtype.name for array in arrays}
    if len(dtypes) > 1:  # they would be promoted, and 8 bits no longer scaled to 0..1
        raise ValueError(f"{count} frames or pages of different dtypes: {', '.join(sorted(dtypes))}")
    return np.stack(arrays), "NHWC"


class _PillowFrames:
    """The frames of a picture that Pillow has opened."""

    def __init__(self, file: Any, options: Options) -> None:
        self.file, self.channels = file, options.channels

    def count(self) -> int:
        return getattr(self.file, "n_frames", 1) if self.file.format != "MPO" else 1

    def read(self, number: int) -> np.ndarray:
        image = self.file
        if number > 0:
            image.seek(number)
        if changes := _changes(image):
            others = "" if image.format == "TIFF" else "; OpenCV reads it (cv2.IMREAD_UNCHANGED): save it as .npy"
            raise _ChangedError(f"{changes}{others}")
        if image.mode.startswith(("I", "F")):  # gray with more than 8 bits, to which Pillow clips
            if self.channels == "rgb":
                raise ValueError(f"Pillow cannot convert mode {image.mode} to RGB")
            return np.array(image)
        mode = self.channels or image.mode
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # Pillow warns of transparency if converted to RGB directly
        return np.array(image.convert(_MODES.get(mode, mode)))


class _TiffPages:
    """The pages of a TIFF file that Pillow does not read as they are."""

    def __init__(self, path: Path, options: Options) -> None:
        self.path, self.max_pixels = path, options.max_pixels

    def count(self) -> int:
        import tifffile

        with tifffile.TiffFile(self.path) as file:
            return len(file.pages)

    def read(self, number: int) -> np.ndarray:
        import tifffile

        with tifffile.TiffFile(self.path) as file:
            page: Any = file.pages[number]
            _check_size(page.imagewidth, page.imagelength, self.max_pixels)
            colors = page.photometric
            if colors not in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB) or page.axes not in _AXES:
                raise ValueError(f"axes {page.axes}, photometric interpretation {colors.name}: save it as .npy")
            pixels: np.ndarray = page.asarray()
        if pixels.dtype == np.uint32:
            pixels = pixels.astype(np.int64)
        return np.moveaxis(pixels, 0, -1) if page.axes == "SYX" else pixels


_AXES = ("YX", "YXS", "SYX")  # of a TIFF page

# Tags of a TIFF file.
_BITS, _SAMPLES, _EXTRA_SAMPLES, _FORMAT = 258, 277, 338, 339
_PREMULTIPLIED = 1  # an extra sample: the colors are multiplied by it
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
        if _PREMULTIPLIED in tags.get(_EXTRA_SAMPLES, ()) and file.mode == "RGBA":
            return "colors multiplied by the opacity, by which Pillow divides them"
    elif mode not in _WIDE and _is_deep(file):
        return f"more than 8 bits per sample, of which Pillow keeps 8 in mode {file.mode}"
    return ""


def _is_deep(file: Any) -> bool:
    """Whether a file that is no TIFF stores more than 8 bits per sample."""
    if file.format in _DEPTHS:
        with Path(file.filename).open("rb") as opened:
            start = opened.read(1 << 16)
        mark, is_deep = _DEPTHS[file.format]
        where = start.find(mark)
        return where >= 0 and is_deep(start[where + len(mark) :])
    return any(_decodes_deep(codec, arguments) for codec, _, _, arguments in file.tile)


# Of formats whose decoder does not tell: the bytes before the header that has the depth, and how to read it.
# JPEG 2000: the SIZ segment has 36 bytes, the number of components, and three bytes of each, the first with the depth
# minus 1 and a sign. AVIF: the third byte of av1C has a bit for more than 8 bits.
_DEPTHS: dict[str, tuple[bytes, Callable[[bytes], bool]]] = {
    "JPEG2000": (
        b"\xff\x4f\xff\x51",
        lambda size: any(depth > 7 for depth in size[38 : 38 + 3 * int.from_bytes(size[36:38], "big") : 3]),
    ),
    "AVIF": (b"av1C", lambda configuration: bool(configuration[2] & 0x40)),
}


def _decodes_deep(codec: str, arguments: Any) -> bool:
    """Whether a decoder reads more than 8 bits per sample: its name or raw mode says so, or the maximum of a PPM."""
    raw_mode, *rest = arguments if isinstance(arguments, tuple) else (arguments,)
    # BGR;16 are 16 bits per pixel.
    is_wide = codec == "SGI16" or (";16" in str(raw_mode) and raw_mode != "BGR;16")
    return is_wide or (codec.startswith("ppm") and any(value > 255 for value in rest))


class Arrays:
    """Array files, each of many images or of one, read in parts of some megabytes."""

    may_use_workers = False  # an array needs no decoding

    def __init__(self, paths: list[Path], options: Options, files: Files | None = None) -> None:
        self.key, self.files = options.key, files or Files()
        self.images = 0
        self._parts: list[tuple[Path, slice, str]] = []
        self._opened: tuple[Path, Tensor | np.ndarray] | None = None
        for path in sorted(paths):
            array = self._open(path)
            try:
                layout = options.layout or _stack_layout(path, array) or guess_layout(array, "--layout")
                if len(layout) != array.ndim:
                    raise ValueError(f"--layout {layout} does not fit shape {tuple(array.shape)}")
            except ValueError as error:
                raise CommandError(f"{path}: {error}") from error
            images = array.shape[layout.index("N")] if "N" in layout else 1
            step = max(1, _VALUES_AT_A_TIME * images // max(1, int(np.prod(array.shape))))
            self._parts += [(path, slice(first, first + step), layout) for first in range(0, max(images, 1), step)]
            self.images += images

    def _open(self, path: Path) -> Tensor | np.ndarray:
        """The array. The last one stays open: with all of them, a process can have too many open files."""
        if self._opened is None or self._opened[0] != path:
            self._opened = path, read_array(path, self.key)
        return self._opened[1]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> tuple[Tensor | np.ndarray, str]:
        path, images, layout = self._parts[index]
        array = self._open(path)
        return array[(slice(None),) * layout.index("N") + (images,)] if "N" in layout else array, layout

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self._parts[index][0])

    def left_out(self) -> dict[str, list[str]]:
        """Other files of a folder."""
        return self.files.left_out()


def open_source(paths: list[Path], options: Options) -> Source:
    """The images in files and folders.

    Raises:
        CommandError, OSError: no images, or an option that does not apply to them; the message names the path.
    """
    if options.layout is not None:
        try:
            check_layout(options.layout)
        except ValueError as error:
            raise CommandError(str(error)) from error
    counts = Counter(os.path.realpath(path) for path in paths)
    for path in paths:
        if counts[os.path.realpath(path)] > 1:
            raise CommandError(f"{path}: given more than once")
    files = Files()
    for path in paths:
        if path.is_dir():
            _add_folder(files, path, options.recursive)
        else:
            (files.arrays if is_array(path) else files.pictures).append(path)
    if files.arrays and files.pictures:
        raise CommandError(f"{files.arrays[0]} is an array and {files.pictures[0]} is not: pass one kind")
    if files.arrays:
        for option, value in (("--channels", options.channels), ("--frames", options.frames)):
            if value is not None:
                raise CommandError(f"{option} applies to pictures, but {files.arrays[0]} contains an array")
        return Arrays(files.arrays, options, files)
    for option, value in (("--layout", options.layout), ("--key", options.key)):
        if value is not None:
            raise CommandError(f"{option} applies to arrays; a picture file defines its own layout")
    if not _has("PIL"):
        raise CommandError("pillow not installed: pip install 'normfused[data]'")
    return Pictures(files, options)


def _add_folder(files: Files, folder: Path, recursive: bool) -> None:
    """Adds the pictures of a folder; of a folder without pictures the arrays."""
    found = find_files(folder, _picture_endings(), recursive)
    if not found.pictures and not found.arrays:
        if found.others and not _has("PIL"):
            raise CommandError("pillow not installed: pip install 'normfused[data]'")
        hint = f"; --recursive searches its subfolders ({len(found.subfolders)})" if found.subfolders else ""
        raise CommandError(f"{folder}: no picture files{hint}")
    if found.pictures:
        found.others += found.arrays
        found.arrays = []
    for name in ("pictures", "arrays", "others", "subfolders"):
        getattr(files, name).extend(getattr(found, name))


def _picture_endings() -> set[str]:
    if not _has("PIL"):
        return set()
    from PIL import Image

    return {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}


def find_files(folder: Path, endings: set[str], recursive: bool) -> Files:
    """The files of a folder, and with ``recursive`` of all folders below it.

    Links to folders are followed, but not into a folder that contains the link. A file is a picture if its name has one
    of the ``endings``, and an array if it ends in .npy or .npz.
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
                ending = path.suffix.lower()
                kind = files.pictures if ending in endings else files.arrays if ending in _NUMPY else files.others
                kind.append(path)
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
    if path.suffix.lower() in _NUMPY:
        raise ValueError(
            f"shape {tuple(array.shape)} is --layout NHW for many grayscale images, HWC or CHW for one image"
        )
    return "NHW"  # as MNIST's files are


_NUMPY = (".npy", ".npz")


def is_array(path: Path) -> bool:
    """Whether a file holds an array: by its name, or the first bytes of an IDX file."""
    return path.suffix.lower() in (*_NUMPY, ".gz") or is_idx(path)


def read_array(path: Path, key: str | None) -> Tensor | np.ndarray:
    """The array in the file, a .npy file memory-mapped. ``key``: its name in an .npz file."""
    if path.suffix.lower() != ".npz" and key is not None:
        raise CommandError(f"{path}: --key names an array of an .npz file")
    if path.suffix.lower() not in _NUMPY:
        return read_idx(path)
    try:
        content: Any = np.load(path, mmap_mode="r")
        if isinstance(content, np.ndarray):
            return content
        with content:
            names = ", ".join(content.files) or "no array"
            if key is not None and key not in content.files:
                raise ValueError(f"contains {names}, not {key}")
            if key is None and len(content.files) != 1:
                raise ValueError(f"contains {names}{': --key chooses one' if content.files else ''}")
            array: np.ndarray = content[content.files[0] if key is None else key]
            return array
    except OSError:
        raise  # its message names the file
    except Exception as error:  # a damaged file can raise almost anything
        raise CommandError(f"{path}: {error}") from error
