"""Statistics of a whole data set, read in this process or in several."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, IterableDataset

from normfused.checks import check_process_group
from normfused.data.images import guess_layout
from normfused.data.stats import NONFINITE, ChannelStats, measure

# Of a tensor or array at least so many: less, and calls take longer than their work.
_VALUES_AT_A_TIME = 1 << 20
_IMAGE_KEYS = ("image", "images", "img", "pixel_values")

# What an error calls the images, and their statistics.
Part = tuple[str, ChannelStats]


def dataset_stats(
    data: Any,
    *,
    layout: str | None = None,
    scale: float | None = None,
    key: Any = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool | None = None,
    process_group: Any = None,
) -> ChannelStats:
    """The statistics of a whole data set.

    After Ctrl-C: those of the images so far, with ``complete`` False.

    Args:
        data: a tensor or array of images, with a first dimension N; a map-style dataset or a sequence; an iterable
            dataset; a ``DataLoader``; any iterable. Its items are what :meth:`ChannelStats.update` takes, or tuples or
            dicts that hold it.
        layout: of ``data`` where that is a tensor or array, else of each item; see :meth:`ChannelStats.update`.
        scale: see :class:`ChannelStats`.
        key: which part of an item is the image. Default: the first of a tuple or list; of a dict the one entry named
            ``"image"``, ``"images"``, ``"img"`` or ``"pixel_values"``.
        batch_size: images whose statistics are computed before they are merged, or sent by a worker.
        num_workers: processes that read a dataset's items and compute their statistics, which are all they send. 0:
            this one, as always for a tensor or array. An iterable dataset must give each worker its own share, as for
            any ``DataLoader``. The result is the same to the bit; of an iterable dataset's floating values, to
            rounding.
        progress: whether to show a progress bar, which needs ``tqdm``. Default: where stderr is a terminal.
        process_group: a process group of :mod:`torch.distributed`, such as ``torch.distributed.group.WORLD``. Each of
            its ranks reads a part of the data, and all get the same result. If ``data`` cannot be indexed, each rank
            passes its own part. Default: this process reads all of ``data``.

    Raises:
        ValueError: no images; an item that cannot be used, whose number the text gives; ``num_workers`` for data that
            cannot be shared out.
        TypeError: an item of a type that is not supported.
        RuntimeError: an item that the dataset fails to give; an error of another rank of ``process_group``.

    Warns:
        RuntimeWarning: NaN or infinity in the images; Ctrl-C.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    is_indexed = not isinstance(data, IterableDataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__")
    items = range(len(data)) if is_indexed else None
    if process_group is not None:
        check_process_group("dataset_stats", process_group)
        rank, ranks = distributed.get_rank(process_group), distributed.get_world_size(process_group)
        progress = progress if rank == 0 else False
        if items is not None:
            items = items[len(items) * rank // ranks : len(items) * (rank + 1) // ranks]
    own, total = (None, None) if items is None else (len(items), len(data))

    def read() -> ChannelStats:
        parts: Iterable[Part]
        if isinstance(data, (Tensor, np.ndarray)):
            assert items is not None
            parts = _stack_parts(data, items, layout, scale, batch_size)
        else:
            parts = _dataset_parts(data, _Reader(layout, scale, key), items, batch_size, num_workers)
        return collect(parts, scale, own, progress)

    stats = read() if process_group is None else _of_all_ranks(read, process_group)
    if stats.images and stats.nonfinite.any():
        warnings.warn(NONFINITE, RuntimeWarning, stacklevel=2)
    if not stats.complete:
        done = f"{stats.images:,}" if total is None else f"{stats.images:,} of {total:,}"
        warnings.warn(f"interrupted: the statistics are those of {done} images", RuntimeWarning, stacklevel=2)
    elif not stats.images:
        raise ValueError("data holds no images")
    return stats


def _of_all_ranks(read: Callable[[], ChannelStats], process_group: Any) -> ChannelStats:
    """What all ranks read. The error of one is an error of all, because all wait for it."""
    failure = None
    own: ChannelStats | str
    try:
        own = read()
    except Exception as error:
        own, failure = repr(error), error
    outcomes: list[Any] = [None] * distributed.get_world_size(process_group)
    distributed.all_gather_object(outcomes, own, group=process_group)
    if failure is not None:
        raise failure
    stats = ChannelStats(outcomes[0].scale if isinstance(outcomes[0], ChannelStats) else None)
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, str):
            raise RuntimeError(f"rank {rank}: {outcome}")
        try:
            stats.merge(outcome)
        except ValueError as error:
            raise ValueError(f"rank {rank}: {error}") from error
    return stats


def collect(parts: Iterable[Part], scale: float | None, total: int | None, progress: bool | None) -> ChannelStats:
    """All parts merged in their order, those before Ctrl-C at least, with a progress bar over ``total`` images."""
    stats = ChannelStats(scale)
    try:
        with progress_bar(total, progress) as advance:
            for name, part in parts:
                try:
                    stats.merge(part)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                advance(part.images)
    except KeyboardInterrupt:
        stats.complete = False
    return stats


@contextmanager
def progress_bar(total: int | None, wanted: bool | None) -> Iterator[Callable[[int], object]]:
    """Gives the function that moves the bar on by some images."""
    if importlib.util.find_spec("tqdm") is None:
        yield lambda images: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=" images", disable=None if wanted is None else not wanted) as bar:
        yield bar.update


def _stack_parts(
    images: Tensor | np.ndarray, items: range, layout: str | None, scale: float | None, batch_size: int
) -> Iterator[Part]:
    """Of images with a first dimension N, ``batch_size`` at a time or more."""
    layout = layout or guess_layout(images)
    if not layout.startswith("N"):
        raise ValueError(
            f"data of shape {tuple(images.shape)} is one image as {layout}: pass layout='NHW' for many grayscale ones"
        )
    step = max(batch_size, _VALUES_AT_A_TIME * len(images) // max(1, math.prod(images.shape)))
    for first in items[::step]:
        yield f"item {first}", measure(images[first : min(first + step, items.stop)], layout, scale)


class _Reader(NamedTuple):
    """How an item becomes statistics."""

    layout: str | None
    scale: float | None
    key: Any

    def add(self, item: Any, stats: ChannelStats) -> None:
        stats.merge(measure(self._image(item), self.layout, self.scale))

    def _image(self, item: Any) -> Any:
        if self.key is not None:
            return item[self.key]
        if isinstance(item, Mapping):
            found = [name for name in _IMAGE_KEYS if name in item]
            if len(found) != 1:
                raise ValueError(f"a dict of {', '.join(map(str, item))}: pass key= to say which is the image")
            return item[found[0]]
        return item[0] if isinstance(item, (tuple, list)) else item


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """An error says which item it is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"item {index}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"item {index}: {error!r}") from error


class _Batches(Dataset[Part]):
    """The statistics of a map-style dataset's items, some at a time."""

    def __init__(self, data: Sequence[Any], items: range, reader: _Reader, batch_size: int) -> None:
        self.data, self.items, self.reader, self.batch_size = data, items, reader, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.items) / self.batch_size)

    def __getitem__(self, batch: int) -> Part:
        items = self.items[batch * self.batch_size :][: self.batch_size]
        stats = ChannelStats(self.reader.scale)
        for index in items:
            with _naming(index):
                self.reader.add(self.data[index], stats)
        return f"item {items.start}", stats


class _Stream(IterableDataset[Part]):
    """The statistics of an iterable's items, one at a time."""

    def __init__(self, data: Iterable[Any], reader: _Reader) -> None:
        self.data, self.reader = data, reader

    def __iter__(self) -> Iterator[Part]:
        for index, item in enumerate(self.data):
            stats = ChannelStats(self.reader.scale)
            with _naming(index):
                self.reader.add(item, stats)
            yield f"item {index}", stats


def _dataset_parts(
    data: Any, reader: _Reader, items: range | None, batch_size: int, num_workers: int
) -> Iterable[Part]:
    if num_workers and items is None and not isinstance(data, IterableDataset):
        raise ValueError(f"num_workers={num_workers} needs a dataset or a sequence, got {type(data).__name__}")
    source: Dataset[Part] = _Stream(data, reader) if items is None else _Batches(data, items, reader, batch_size)
    # A generator of its own: the random numbers of all others stay as they are.
    return DataLoader(source, batch_size=None, num_workers=num_workers, generator=torch.Generator())
