"""What sources of images have in common: options, the search of folders, and reading in parts."""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from normfused.data.stats import ChannelStats, measure

MAX_THREADS = 4  # that read and measure: more would wait for Python's lock
MAX_PIXELS = 178_956_970  # of a picture, above which Pillow suspects a file that is made to fill the memory


@dataclass(frozen=True)
class Options:
    """How files are read.

    ``layout``, ``key``: of an array; ``key`` None: the only one of an .npz file. ``channels``: ``"gray"`` or ``"rgb"``
    that pictures and frames are converted to; None: as stored. ``frames``: ``"first"`` or ``"all"`` of a video, of the
    pages of a TIFF or the frames of an animation; None: all of a video, of the others more than one are an error.
    ``recursive``: whether subfolders are searched. ``max_pixels``: of a picture or frame.
    """

    layout: str | None = None
    key: str | None = None
    channels: str | None = None
    frames: str | None = None
    recursive: bool = False
    max_pixels: int = MAX_PIXELS


Image = tuple[Tensor | np.ndarray, str]  # one image or several, and their layout


class Source(Protocol):
    """Images, read in parts."""

    images: int | None  # None: not known before they are read
    may_use_workers: bool
    may_use_threads: bool  # several may call read() at once, and it mostly releases Python's lock

    def __len__(self) -> int:
        """Number of parts."""

    def read(self, index: int) -> Iterator[Image]:
        """The images of a part. Raises the errors of a damaged file, of any type."""

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
            stats = self.like.empty()
            for image, layout in self.source.read(index):
                stats.merge(measure(image, layout, self.like))
            return stats
        except Exception as error:  # a damaged file can raise almost anything
            return str(error) or repr(error)


def read_parts(
    source: Source, parts: range, like: ChannelStats, workers: int, failed: Callable[[int, str], None]
) -> Iterator[tuple[str, ChannelStats]]:
    """Names and statistics of these parts of the source, of those that can be read.

    ``failed`` is called with the number of each other part and the reason.
    """
    measured = load(Subset(_Measured(source, like), parts), source, workers)
    for index, part in zip(parts, measured, strict=True):
        if isinstance(part, ChannelStats):
            yield source.name(index), part
        else:
            failed(index, part)


def load(items: Subset[Any], source: Source, workers: int) -> Iterable[Any]:
    """The items of a dataset, computed by worker processes or threads if that pays off for the source."""
    if workers > 0 and source.may_use_workers:
        # A separate generator: DataLoader would draw a number from the default one.
        return DataLoader(items, batch_size=None, num_workers=workers, generator=torch.Generator())
    threads = min(torch.get_num_threads(), MAX_THREADS, len(items))
    if threads > 1 and source.may_use_threads:
        return _load_in_threads(items, threads)
    return (items[index] for index in range(len(items)))


def _load_in_threads(items: Subset[Any], threads: int) -> Iterator[Any]:
    """The items, each computed by one of the threads, which use no threads of torch's in addition."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    pending: deque[Future[Any]] = deque()
    try:
        for index in range(len(items)):
            pending.append(pool.submit(items.__getitem__, index))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # of threads that start later: it was changed with that of the pool's


KINDS = {"pictures": "a picture", "arrays": "an array", "videos": "a video"}


@dataclass
class Files:
    """The files of a folder, links followed."""

    # Files to read. Also links to nothing and folders that cannot be listed, whose reading fails with the reason.
    pictures: list[Path] = field(default_factory=list)
    arrays: list[Path] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)  # of another kind, by their names
    subfolders: list[Path] = field(default_factory=list)  # not searched

    def kinds(self) -> list[str]:
        """The kinds of :data:`KINDS` that are present, in that order."""
        return [kind for kind in KINDS if getattr(self, kind)]

    def add(self, found: Files) -> None:
        """Add all files of ``found``."""
        for name, paths in vars(found).items():
            getattr(self, name).extend(paths)

    def left_out(self) -> dict[str, list[str]]:
        """The paths that are not read, by the reason."""
        kind = KINDS[(self.kinds() or ["pictures"])[0]]
        reasons = {
            f"not {kind} by its name": self.others,
            "subfolder, which --recursive searches": self.subfolders,
        }
        return {reason: [str(path) for path in sorted(paths)] for reason, paths in reasons.items() if paths}


def find_files(folder: Path, kind_of: Callable[[Path], str], recursive: bool) -> Files:
    """The files of a folder, and with ``recursive`` of all folders below it.

    Links to folders are followed, but not into a folder that contains the link. ``kind_of`` returns the list of
    :class:`Files` that a file is added to.
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
                getattr(files, kind_of(path)).append(path)
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


def has(package: str) -> bool:
    """Whether an optional package is installed."""
    return importlib.util.find_spec(package) is not None
