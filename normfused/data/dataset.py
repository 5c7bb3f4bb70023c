"""Statistics of a whole data set, read by one process or several."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from normfused._torch_private import watched_worker_info
from normfused.checks import check_process_group
from normfused.data.images import guess_layout
from normfused.data.paths import open_source
from normfused.data.records import Weight, check_weights
from normfused.data.sources import Options, Source, read_parts
from normfused.data.stats import NONFINITE, ChannelStats, measure

# Minimum number of values of a tensor or array per call. With fewer the overhead of a call outweighs its work.
_VALUES_AT_A_TIME = 1 << 20
_IMAGE_KEYS = ("image", "images", "img", "pixel_values")

# A name for the images, used in errors, and their statistics.
Part = tuple[str, ChannelStats]


def dataset_stats(
    data: Any,
    *,  # independent options, each with a default
    layout: str | None = None,
    scale: float | None = None,
    nodata: float | None = None,
    quantiles: Sequence[float] = (),
    weights: Sequence[float] | Tensor | None = None,
    key: Any = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool | None = None,
    process_group: Any = None,
) -> ChannelStats:
    """Compute the channel statistics of a whole data set.

    Ctrl-C stops the reading and returns the statistics of the images so far, with ``complete=False``.

    Args:
        data: a tensor or array (also of ``zarr`` or ``h5py``) of images with a first dimension N; the path of a file or
            folder, as for ``normfused stats``; a map-style dataset or sequence; an iterable dataset; a ``DataLoader``;
            any iterable. Items are what :meth:`ChannelStats.update` accepts, or tuples or dicts that contain it.
        layout: layout of ``data`` if that is a tensor or array, else of each item; see :meth:`ChannelStats.update`. It
            must be given if a ``DataLoader`` batches items to three dimensions.
        scale, nodata, quantiles: as in :class:`ChannelStats`.
        weights: how many times each item counts, as in :meth:`ChannelStats.update`: a number for each, such as those
            of ``torch.utils.data.WeightedRandomSampler``. They need data that can be indexed.
        key: index or key of the image in an item. Default: 0 for a tuple or list; for a dict the one key of
            ``"image"``, ``"images"``, ``"img"`` and ``"pixel_values"`` that it has.
        batch_size: number of images whose statistics are merged at once, or sent by a worker at once.
        num_workers: processes that read items and compute their statistics; only statistics are sent back. 0: this
            process, which always reads tensors and arrays. It reads picture files of at least 16 KB (on average) in up
            to four threads, no more than ``torch.get_num_threads()``. An iterable dataset that asks for
            ``torch.utils.data.get_worker_info()`` before its first item must give each worker its own share, as for any
            ``DataLoader``; of any other each worker reads all items, and uses every ``num_workers``-th. The result does
            not depend on it, except for rounding of the floating values of an iterable dataset.
        progress: whether to show a progress bar, which needs ``tqdm``. Default: only if stderr is a terminal.
        process_group: a process group of :mod:`torch.distributed`, such as ``torch.distributed.group.WORLD``. Each of
            its ranks reads a part of the data, and all get the same result. If ``data`` cannot be indexed, each rank
            passes its own part. Default: this process reads all of ``data``.

    Returns:
        A new :class:`ChannelStats`. The random number generators of the process are not used.

    Raises:
        ValueError: no images; an item that cannot be used (the message has its number); ``num_workers`` or ``weights``
            for data that cannot be indexed; another number of weights than of items.
        TypeError: data or an item of an unsupported type.
        RuntimeError: the dataset fails to return an item; an error of another rank of ``process_group``.

    Warns:
        RuntimeWarning: NaN or infinity in the images; an interruption by Ctrl-C.

    Example:
        >>> import torch, normfused
        >>> items = [(torch.full((3, 4, 4), value), "label") for value in (0.0, 1.0)]
        >>> normfused.dataset_stats(items, progress=False)
        ChannelStats(images=2, channels=3, mean=[0.5000, 0.5000, 0.5000], std=[0.5000, 0.5000, 0.5000])
    """
    like = ChannelStats(scale, nodata, quantiles)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(data, Mapping):
        names = ", ".join(map(repr, data))
        raise TypeError(f"data must be one dataset, got a {type(data).__name__} of {names}: pass one of them")
    is_source = isinstance(data, (str, os.PathLike))
    if not is_source and not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise TypeError(f"data must be a path, tensor, array, dataset, loader or iterable, got {type(data).__name__}")
    if is_source:
        data = open_source([Path(data)], Options(layout=layout, key=key))
    is_indexed = not isinstance(data, IterableDataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__")
    items = range(len(data)) if is_source or is_indexed else None
    if process_group is not None:
        check_process_group("dataset_stats", process_group)
        rank, ranks = distributed.get_rank(process_group), distributed.get_world_size(process_group)
        progress = progress if rank == 0 else False
        if items is not None:
            items = items[len(items) * rank // ranks : len(items) * (rank + 1) // ranks]
    if weights is not None and (items is None or is_source):
        raise ValueError("weights need data that can be indexed: a tensor, an array, a dataset or a sequence")
    numbers = None if weights is None else check_weights(weights, len(data))
    own, total = (None, None) if items is None or is_source else (len(items), len(data))

    def read() -> ChannelStats:
        parts: Iterable[Part]
        if is_source:
            assert items is not None
            parts = read_parts(data, items, like, num_workers, lambda index, reason: _fail(data, index, reason))
        elif items is not None and _is_array(data):
            parts = _stack_parts(data, items, layout, like, numbers, batch_size)
        else:
            are_batches = isinstance(data, DataLoader) and data.batch_sampler is not None
            reader = _Reader(layout, like, key, are_batches, numbers)
            parts = _dataset_parts(data, reader, items, batch_size, num_workers)
        return collect(parts, like, own, progress)

    stats = read() if process_group is None else _of_all_ranks(read, process_group)
    if is_source and (left_out := data.left_out()):
        listed = "; ".join(f"{reason}: {', '.join(paths[:5])}" for reason, paths in left_out.items())
        warnings.warn(f"not read: {listed}", RuntimeWarning, stacklevel=2)
    _warn_about(stats, total)
    return stats


def _warn_about(stats: ChannelStats, total: int | None) -> None:
    """Warn the caller of :func:`dataset_stats` about what is missing in the statistics; raise if there are none."""
    if stats.images and stats.nonfinite.any():
        warnings.warn(NONFINITE, RuntimeWarning, stacklevel=3)
    if not stats.complete:
        done = f"{stats.images:,}" if total is None else f"{stats.images:,} of {total:,}"
        warnings.warn(f"interrupted: the statistics cover {done} images", RuntimeWarning, stacklevel=3)
    elif not stats.images:
        raise ValueError("data holds no images")


def _fail(source: Source, index: int, reason: str) -> None:
    raise ValueError(f"{source.name(index)}: {reason}")


def _is_array(data: Any) -> bool:
    """Whether data is a tensor, or an array of NumPy, zarr or h5py, which slices many images at once."""
    if isinstance(data, (Tensor, np.ndarray)):
        return True
    return not isinstance(data, Dataset) and hasattr(data, "dtype") and len(getattr(data, "shape", ())) > 1


def _of_all_ranks(read: Callable[[], ChannelStats], process_group: Any) -> ChannelStats:
    """The merged statistics of all ranks. An error on one rank raises on all, because all wait for its result."""
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
    stats = outcomes[0].empty() if isinstance(outcomes[0], ChannelStats) else ChannelStats()
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, str):
            raise RuntimeError(f"rank {rank}: {outcome}")
        try:
            stats.merge(outcome)
        except ValueError as error:
            raise ValueError(f"rank {rank}: {error}") from error
    return stats


def collect(parts: Iterable[Part], like: ChannelStats, total: int | None, progress: bool | None) -> ChannelStats:
    """All parts merged in order, with a progress bar over ``total`` images. Ctrl-C ends the merge early."""
    stats = like.empty()
    try:
        with progress_bar(total, progress) as advance:
            for name, part in parts:
                try:
                    stats.merge(part)
                except ValueError as error:
                    raise type(error)(f"{name}: {error}") from error
                advance(part.images)
    except KeyboardInterrupt:
        stats.complete = False
    return stats


@contextmanager
def progress_bar(total: int | None, enabled: bool | None) -> Iterator[Callable[[int], object]]:
    """A context with a progress bar. Its value is a function that advances the bar by a number of images."""
    if importlib.util.find_spec("tqdm") is None:
        yield lambda images: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=" images", disable=None if enabled is None else not enabled) as bar:
        yield bar.update


def _stack_parts(
    images: Tensor | np.ndarray,
    items: range,
    layout: str | None,
    like: ChannelStats,
    weights: list[Weight] | None,
    batch_size: int,
) -> Iterator[Part]:
    """Statistics of a tensor or array of images with a first dimension N, at least ``batch_size`` images at a time."""
    layout = layout or guess_layout(images)
    if not layout.startswith("N"):
        raise ValueError(
            f"data of shape {tuple(images.shape)} has layout {layout}, whose first dimension is not N: "
            "pass layout='NHW' for many grayscale images"
        )
    step = max(batch_size, _VALUES_AT_A_TIME * len(images) // max(1, math.prod(images.shape)))
    for first in items[::step]:
        part = slice(first, min(first + step, items.stop))
        yield f"item {first}", measure(images[part], layout, like, weights=weights and weights[part])


class _Reader(NamedTuple):
    """Computes the statistics of an item."""

    layout: str | None
    like: ChannelStats
    key: Any
    are_batches: bool  # whether items are batches of a DataLoader
    weights: list[Weight] | None  # of the items

    def add_item(self, data: Sequence[Any], index: int, stats: ChannelStats) -> None:
        """Add an item that is known by its number, unless its weight is 0."""
        weight = 1 if self.weights is None else self.weights[index]
        if weight > 0:
            stats.merge(self.measure(data[index]).weigh(weight))

    def measure(self, item: Any) -> ChannelStats:
        """The statistics of one item."""
        image = self._image(item)
        if self.are_batches and self.layout is None and getattr(image, "ndim", 4) == 3:
            raise ValueError(
                f"a batch of shape {tuple(image.shape)}: pass layout=, 'NHW' for grayscale images, or the layout of a "
                "single image"
            )
        return measure(image, self.layout, self.like)

    def _image(self, item: Any) -> Any:
        if self.key is not None:
            return item[self.key]
        if isinstance(item, Mapping):
            found = [name for name in _IMAGE_KEYS if name in item]
            if len(found) != 1:
                raise ValueError(f"a dict with the keys {', '.join(map(str, item))}: pass key= to select the image")
            return item[found[0]]
        return item[0] if isinstance(item, (tuple, list)) else item


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """A context that adds the number of the item to errors."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"item {index}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"item {index}: {error!r}") from error


class _Batches(Dataset[Part]):
    """The statistics of the items of a map-style dataset, ``batch_size`` at a time."""

    def __init__(self, data: Sequence[Any], items: range, reader: _Reader, batch_size: int) -> None:
        self.data, self.items, self.reader, self.batch_size = data, items, reader, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.items) / self.batch_size)

    def __getitem__(self, batch: int) -> Part:
        items = self.items[batch * self.batch_size :][: self.batch_size]
        stats = self.reader.like.empty()
        for index in items:
            with _naming(index):
                self.reader.add_item(self.data, index, stats)
        return f"item {items.start}", stats


class _Stream(IterableDataset[Part]):
    """The statistics of the items of an iterable, one at a time.

    In each of several worker processes it holds that worker's share of the items.
    """

    def __init__(self, data: Iterable[Any], reader: _Reader) -> None:
        self.data, self.reader = data, reader

    def _share(self) -> Iterator[tuple[int, Any]]:
        """Items and their numbers. A dataset that does not ask for its worker gives all items to each of them."""
        worker = get_worker_info()
        if worker is None:
            yield from enumerate(self.data)
            return
        with watched_worker_info() as was_read:
            items = iter(self.data)
            start = list(itertools.islice(items, 1))
        first, step = (0, 1) if was_read() else (worker.id, worker.num_workers)
        yield from itertools.islice(enumerate(itertools.chain(start, items)), first, None, step)

    def __iter__(self) -> Iterator[Part]:
        for index, item in self._share():
            with _naming(index):
                stats = self.reader.measure(item)
            yield f"item {index}", stats


def _dataset_parts(
    data: Any, reader: _Reader, items: range | None, batch_size: int, num_workers: int
) -> Iterable[Part]:
    if num_workers and items is None and not isinstance(data, IterableDataset):
        raise ValueError(f"num_workers={num_workers} needs a dataset or a sequence, got {type(data).__name__}")
    source: Dataset[Part] = _Stream(data, reader) if items is None else _Batches(data, items, reader, batch_size)
    # A separate generator: DataLoader would draw a number from the default one.
    return DataLoader(source, batch_size=None, num_workers=num_workers, generator=torch.Generator())
