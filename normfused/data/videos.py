"""Video files, whose frames are images."""

from __future__ import annotations

import re
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
    may_use_threads = False  # the decoder has its own
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
            if self.options.frames == "first":
                frame = next(container.decode(stream), None)
                if frame is None:
                    raise ValueError("no frames")
                yield _pixels(frame, self.options)
            else:
                for frame in _all_frames(container, stream):
                    yield _pixels(frame, self.options)

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.paths[index])

    def left_out(self) -> dict[str, list[str]]:
        """Other files of a folder."""
        return self.files.left_out()


def _all_frames(container: Any, stream: Any) -> Iterator[Any]:
    """The decoded frames. Raises ``ValueError`` if there are fewer than the file says, as a damaged file has."""
    count, discarded, end = 0, 0, 0.0
    for packet in container.demux(stream):
        discarded += packet.is_discard  # cut away by an edit list, which leaves the frames in the file
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        for frame in packet.decode():
            count += 1
            yield frame
    if count == 0 or count < stream.frames - discarded:
        raise ValueError(f"{count} of {stream.frames} frames could be decoded" if stream.frames else "no frames")
    # Matroska has no number of frames, but may have the duration, as in "00:01:12.500000000".
    if tag := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):
        duration = (int(tag[1]) * 60 + int(tag[2])) * 60 + float(tag[3])
        if end < duration - 1:
            raise ValueError(f"ends after {end:.1f} of {duration:.1f} s")


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
    # Older versions of PyAV take every frame for one of BT.601 and limited range unless they are told, and only look at
    # the color space if another one is requested. RGB has none.
    pixels: np.ndarray = frame.to_ndarray(
        format=stored if options.channels is None else _FORMATS[options.channels],
        src_colorspace=frame.colorspace,
        dst_colorspace="DEFAULT",
        src_color_range=frame.color_range,
    )
    return pixels, "HWC"[: pixels.ndim]


def is_video_name(path: Path) -> bool:
    """Whether a file holds a video, by its name."""
    return path.suffix.lower() in ENDINGS
