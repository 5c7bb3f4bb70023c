"""The command ``normfused stats``: channel statistics of images in files."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import Subset

from normfused._version import __version__
from normfused.cli import INTERRUPTED
from normfused.data import files
from normfused.data.arrays import Arrays
from normfused.data.dataset import Part, collect, progress_bar
from normfused.data.paths import open_source
from normfused.data.sources import Options, Source, load, read_parts
from normfused.data.stats import ChannelMismatchError, ChannelStats
from normfused.errors import CommandError

__all__ = ["Settings", "run_stats"]

_NAMES = 5  # that a list of files shows


@dataclass(frozen=True)
class Settings:
    """The options of the command.

    ``scale``, ``nodata`` and ``quantiles`` are those of :class:`normfused.ChannelStats`. ``json`` and ``plot`` None:
    no such file. ``skip``: skip unreadable files; otherwise they end the command.
    """

    paths: list[Path]
    reading: Options
    scale: float | None
    nodata: float | None
    quantiles: tuple[float, ...]
    json: Path | None
    plot: Path | None
    workers: int
    skip: bool

    @property
    def like(self) -> ChannelStats:
        """Statistics without images."""
        return ChannelStats(self.scale, self.nodata, self.quantiles)

    @property
    def title(self) -> str:
        """The name of the input."""
        return self.paths[0].name + self.others

    @property
    def others(self) -> str:
        """What follows the first path in messages."""
        return f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""


def run_stats(settings: Settings) -> int:
    """Print the table, write the files, and return the exit code.

    After Ctrl-C the results are those of the images so far, without a plot.

    Raises:
        CommandError, OSError: an input or output cannot be used; the message is one line.
    """
    if settings.plot and importlib.util.find_spec("matplotlib") is None:
        raise CommandError("matplotlib not installed: pip install 'normfused[data]'")
    source = open_source(settings.paths, settings.reading)
    _check_outputs(settings, source)
    skipped: dict[int, str] = {}
    try:
        stats = collect(_parts(source, settings, skipped), settings.like, source.images, None)
    except ChannelMismatchError as error:
        converts = not isinstance(source, Arrays) and settings.reading.channels is None
        hint = "; --channels gray or --channels rgb converts all pictures" if converts else ""
        raise CommandError(f"{error}{hint}") from error
    except ValueError as error:
        raise CommandError(str(error)) from error
    if stats.images or not stats.complete:
        print(stats)
    _print_what_is_missing(source, skipped)
    if settings.json:
        files.replace(settings.json, _as_json(stats, source, settings, skipped))
    if not stats.images and stats.complete:
        raise CommandError(f"{settings.paths[0]}{settings.others}: no image could be read")
    if not stats.complete:
        of_all = "" if source.images is None else f" of {source.images}"
        print(f"interrupted: the statistics cover {stats.images}{of_all} images", file=sys.stderr)
        return INTERRUPTED
    if settings.plot:
        try:
            files.replace(settings.plot, _plot(stats, source, settings, skipped))
        except KeyboardInterrupt:
            print("interrupted: there is no plot", file=sys.stderr)
            return INTERRUPTED
    return 0


def _print_what_is_missing(source: Source, skipped: dict[int, str]) -> None:
    for index, reason in skipped.items():
        print(f"skipped {source.name(index)}: {reason}", file=sys.stderr)
    if skipped:
        print(f"{len(skipped)} of {len(source)} files were skipped", file=sys.stderr)
    for reason, paths in source.left_out().items():
        some = ", ".join(Path(path).name for path in paths[:_NAMES])
        more = f" and {len(paths) - _NAMES} more" if len(paths) > _NAMES else ""
        print(f"not read ({reason}): {some}{more}", file=sys.stderr)


def _check_outputs(settings: Settings, source: Source) -> None:
    """Raises what would prevent the results from being written, before the images are read."""
    outputs = [(option, path) for option, path in (("--json", settings.json), ("--plot", settings.plot)) if path]
    inputs = set()
    if any(path.exists() for _, path in outputs):  # else none is an input, of which there may be a million
        inputs = {os.path.realpath(path) for path in (*map(str, settings.paths), *map(source.name, range(len(source))))}
    for option, path in outputs:
        if not path.parent.is_dir():
            raise CommandError(f"{option} {path}: the folder {path.parent} does not exist")
        if path.is_dir():
            raise CommandError(f"{option} {path}: is a folder")
        if os.path.realpath(path) in inputs:
            raise CommandError(f"{option} {path}: is an input, which would be overwritten")
        if not os.access(path.parent, os.W_OK):
            raise CommandError(f"{option} {path}: the folder {path.parent} is not writable")
    if len({os.path.realpath(path) for _, path in outputs}) < len(outputs):
        raise CommandError(f"--json and --plot both name {settings.json}")


def _parts(source: Source, settings: Settings, skipped: dict[int, str]) -> Iterator[Part]:
    """Statistics of the items that could be read. The reasons for the others are added to ``skipped``."""

    def failed(index: int, reason: str) -> None:
        if not settings.skip:
            raise CommandError(f"{source.name(index)}: {reason}")
        skipped[index] = reason

    return read_parts(source, range(len(source)), settings.like, settings.workers, failed)


def _plot(stats: ChannelStats, source: Source, settings: Settings, skipped: dict[int, str]) -> bytes:
    """The plot as a PNG. Reads the images a second time, because the bins depend on the range of the values."""
    from normfused.cli.stats import histogram  # only here: matplotlib may be missing

    low, high = histogram.value_range(stats)
    counts = histogram.Counts(source, settings.like, low, high)
    read = Subset(counts, [index for index in range(len(source)) if index not in skipped])
    total = torch.zeros(1, dtype=torch.float64)
    with progress_bar(len(read), None) as advance:
        for part in load(read, source, settings.workers):
            total = total + part
            advance(1)
    return histogram.draw(total, stats, low, high, settings.title)


def _as_json(stats: ChannelStats, source: Source, settings: Settings, skipped: dict[int, str]) -> bytes:
    content = {
        "normfused": __version__,
        "settings": _settings(settings),
        "images": stats.images,
        "complete": stats.complete,
        "skipped": {source.name(index): reason for index, reason in skipped.items()},
        "not_read": source.left_out(),
    }
    if stats.images:
        names = ("count", "mean", "std", "min", "max", "nonfinite")
        values = (stats.count, stats.mean, stats.std, stats.min, stats.max, stats.nonfinite)
        content |= {name: _finite(value.tolist()) for name, value in zip(names, values, strict=True)}
        if stats.quantiles:
            rows = zip(stats.quantiles, stats.quantile(), strict=True)
            content["quantiles"] = {str(q): _finite(row.tolist()) for q, row in rows}
    content["stats"] = stats.to_dict()  # exact, for ChannelStats.load
    return files.as_json(content, default=str)


def _settings(settings: Settings) -> dict[str, object]:
    options = asdict(settings)
    return {**options.pop("reading"), **options}


def _finite(values: list[float]) -> list[float | None]:
    """JSON has no NaN and no infinity, the results of a channel without finite values."""
    return [value if math.isfinite(value) else None for value in values]
