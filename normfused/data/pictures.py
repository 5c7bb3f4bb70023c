"""Picture files, read as they are stored."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from normfused.data.sources import Files, Image, Options, has

# Pillow's modes for --channels, and for modes whose values are not colors: palette indices and single bits.
_MODES = {"gray": "L", "rgb": "RGB", "P": "RGB", "PA": "RGB", "1": "L"}
# The average size from which pictures are read by several threads. Of smaller ones, most of the time is Python's, which
# runs in one thread at a time: with files of 3 KB, two threads took twice as long as one; with 46 KB 0.65 times.
THREAD_BYTES = 16 << 10
# Pillow logs what it raises; without a handler that is printed.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class Pictures:
    """Picture files, one at a time. Of the pictures of a phone's MPO file, the first is the photograph."""

    may_use_workers = True

    def __init__(self, files: Files, options: Options) -> None:
        self.files, self.options = files, options
        self.paths = sorted(files.pictures)
        self.images: int | None = len(self.paths)
        some = self.paths[:: 1 + len(self.paths) // 100]
        self.may_use_threads = sum(map(_file_bytes, some)) >= THREAD_BYTES * len(some)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Iterator[Image]:
        """One picture, or its frames."""
        path = self.paths[index]
        if path.is_dir():
            os.listdir(path)  # raises the error that `find_files` met
        with _reading:
            picture = _read_picture(path, self.options)
        yield picture

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.paths[index])

    def left_out(self) -> dict[str, list[str]]:
        """Files that are no pictures, and subfolders."""
        return self.files.left_out()


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # reading it fails with the reason
        return 0


class _Reading:
    """While any thread reads: no warnings about metadata, as damaged pixels are errors, and no limit of Pillow's own.

    Both are settings of the whole process, so the first thread sets them and the last one restores them.
    """

    def __init__(self) -> None:
        self.lock, self.threads, self.restore = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        from PIL import Image

        with self.lock:
            self.threads += 1
            if self.threads == 1:
                self.restore.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                self.restore.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                Image.MAX_IMAGE_PIXELS = None

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.threads -= 1
            if self.threads == 0:
                self.restore.close()


_reading = _Reading()


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
        if not has("tifffile"):
            raise ValueError(f"{error}; tifffile reads it: pip install 'normfused[data]'") from error
        if options.channels is not None:
            raise ValueError(f"{error}; --channels cannot convert it") from error
        return _select_frames(_TiffPages(path, options), options)


def _opened(path: Path, max_pixels: int) -> Any:
    from PIL import Image, UnidentifiedImageError

    expected = Image.EXTENSION.get(path.suffix.lower())  # tried first, because a trial of each format takes time
    try:
        file = Image.open(path, formats=[expected] if expected else None)
    except UnidentifiedImageError:
        file = Image.open(path)
    try:
        check_size(file.width, file.height, max_pixels)
    except ValueError:
        file.close()
        raise
    return file


def check_size(width: int, height: int, limit: int) -> None:
    """Raise ``ValueError`` for more than ``limit`` pixels."""
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
        self.file, self.channels, self.max_pixels = file, options.channels, options.max_pixels

    def count(self) -> int:
        return getattr(self.file, "n_frames", 1) if self.file.format != "MPO" else 1

    def read(self, number: int) -> np.ndarray:
        image = self.file
        if number > 0:
            image.seek(number)
            check_size(image.width, image.height, self.max_pixels)  # the pages of a TIFF can differ in size
        if changes := _changes(image):
            others = "" if image.format == "TIFF" else "; OpenCV reads it (cv2.IMREAD_UNCHANGED): save it as .npy"
            raise _ChangedError(f"{changes}{others}")
        if image.mode.startswith(("I", "F")):  # gray with more than 8 bits, to which Pillow clips
            if self.channels == "rgb":
                raise ValueError(f"Pillow cannot convert mode {image.mode} to RGB")
            return np.array(image)
        mode = self.channels or image.mode
        mode = _MODES.get(mode, mode)
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # Pillow warns of transparency if converted to RGB directly
        return np.array(image if image.mode == mode else image.convert(mode))


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
            check_size(page.imagewidth, page.imagelength, self.max_pixels)
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


def endings() -> set[str]:
    """The endings of names of pictures; none without Pillow."""
    if not has("PIL"):
        return set()
    from PIL import Image

    return {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
