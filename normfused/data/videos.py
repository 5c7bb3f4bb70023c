"""Video files, whose frames are images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from normfused.data.pictures import check_size
from normfused.data.sources import Files, Image, Options

ENDINGS = frozenset(
    (".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".webm", ".wmv")
)
_FORMATS = {"gray": "gray", "rgb": "rgb24"}  # PyAV's names for --channels
_BITS = 8  # of a sample of these formats


class Videos:
    """Video files, decoded frame by frame: one frame at a time is in memory."""

    may_use_workers = True
    images: int | None = None  # not every format tells the number of frames

    def __init__(self, files: Files, options: Options) -> None:
        self.files, self.options = files, options
        self.paths = sorted(files.videos)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Iterator[Image]:
        """The frames of a video."""
        import av

        # Without this option, a decoder replaces damaged parts by what it guesses.
        with av.open(self.paths[index], options={"err_detect": "explode"}) as container:
            if not container.streams.video:
                raise ValueError("no video stream")
            stream: Any = container.streams.video[0]
            check_size(stream.width, stream.height, self.options.max_pixels)
            stream.codec_context.options = {"err_detect": "explode"}
            stream.thread_type = "AUTO"
            count = 0
            for frame in container.decode(stream):
                yield _pixels(frame, self.options)
                count += 1
                if self.options.frames == "first":
                    break
            if count == 0:
                raise ValueError("no frames")

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.paths[index])

    def left_out(self) -> dict[str, list[str]]:
        """Other files of a folder."""
        return self.files.left_out()


def _pixels(frame: Any, options: Options) -> Image:
    """The pixels of a frame in gray, RGB or RGBA, as it is stored, and their layout."""
    if frame.is_corrupt:
        raise ValueError(f"damaged frame at {frame.time} s")
    check_size(frame.width, frame.height, options.max_pixels)
    components = frame.format.components
    if bits := [component.bits for component in components if component.bits > _BITS]:
        raise ValueError(f"format {frame.format.name} has {max(bits)} bits per sample, of which {_BITS} would be kept")
    is_gray = len(components) == 1 and components[0].is_luma and not frame.format.has_palette
    has_alpha = any(component.is_alpha for component in components)
    stored = "gray" if is_gray else "rgba" if has_alpha else "rgb24"
    pixels: np.ndarray = frame.to_ndarray(format=stored if options.channels is None else _FORMATS[options.channels])
    return pixels, "HWC"[: pixels.ndim]


def is_video_name(path: Path) -> bool:
    """Whether a file holds a video, by its name."""
    return path.suffix.lower() in ENDINGS
