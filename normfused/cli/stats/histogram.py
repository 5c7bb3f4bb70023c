"""Histograms of the values of each channel, and their plot."""

from __future__ import annotations

from io import BytesIO

import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset

from normfused.data.sources import Source
from normfused.data.stats import ChannelStats, scale_of, values_of
from normfused.errors import CommandError

BINS = 256
MOST_HISTOGRAMS = 16  # of more channels there is one plot
_RGB = ("#c8453b", "#3c9d6b", "#3b6fc8")
_OTHER = "#5b6470"


def value_range(stats: ChannelStats) -> tuple[float, float]:
    """The range of the bins: one bin per integer if few integers occur, else from minimum to maximum.

    Raises:
        CommandError: no value is finite.
    """
    low, high = stats.min.min().item(), stats.max.max().item()
    if low > high:
        raise CommandError("--plot: all values are NaN or infinite")
    scale = stats.integer_scale
    if scale and stats.sums[0].count == stats.count[0]:  # integers only
        lowest, highest = min(c.min for c in stats.sums), max(c.max for c in stats.sums)
        if highest - lowest < BINS:
            first = 0 if lowest >= 0 and highest < BINS else lowest
            return (first - 0.5) * scale, (first + BINS - 0.5) * scale
    return (low, high) if low < high else (low - 0.5, high + 0.5)


class Counts(Dataset[Tensor]):
    """The histogram of each item of the source: number of scaled values in each bin, shape (C, 256), float64."""

    def __init__(self, source: Source, like: ChannelStats, low: float, high: float) -> None:
        self.source, self.like, self.low, self.high = source, like, low, high

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        total = torch.zeros(1, dtype=torch.float64)
        for image, layout in self.source.read(index):
            x, counted = values_of(image, layout, self.like)
            scale = scale_of(x.dtype, self.like.scale)
            channels = x.unbind(1)
            if counted is not None:
                channels = tuple(channel[kept] for channel, kept in zip(channels, counted, strict=True))
            total = total + torch.stack([torch.histc(c.double() * scale, BINS, self.low, self.high) for c in channels])
        return total


def draw(counts: Tensor, stats: ChannelStats, low: float, high: float, name: str) -> bytes:
    """A PNG with a histogram of each channel, its mean and its standard deviation; of many channels only the range."""
    channels = len(counts)
    rows = channels if channels <= MOST_HISTOGRAMS else 2
    figure = Figure(figsize=(8, 1 + 2.4 * rows), dpi=150, layout="constrained")
    summary = str(stats).partition("\n")[0]
    figure.suptitle(f"{_printable(name)}, {summary}", parse_math=False)
    (_draw_histograms if channels <= MOST_HISTOGRAMS else _draw_ranges)(figure, counts, stats, low, high)
    png = BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _draw_histograms(figure: Figure, counts: Tensor, stats: ChannelStats, low: float, high: float) -> None:
    channels = len(counts)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    mean, std = stats.mean.tolist(), stats.std.tolist()
    for channel, axes in enumerate(figure.subplots(channels, 1, sharex=True, squeeze=False)[:, 0]):
        axes.set_ylabel("number of values")
        axes.spines[["top", "right"]].set_visible(False)
        if not counts[channel].any():
            axes.set_title(f"channel {channel}: all values are NaN or infinite", loc="left", fontsize="medium")
            continue
        color = _RGB[channel] if channels == len(_RGB) else _OTHER
        axes.stairs(counts[channel].numpy(), edges.numpy(), fill=True, color=color)
        axes.axvline(mean[channel], color="black", linewidth=1.5)
        axes.axvspan(mean[channel] - std[channel], mean[channel] + std[channel], color="black", alpha=0.1)
        figures = f"mean {mean[channel]:.4g} (line), std {std[channel]:.4g} (band: mean ± std)"
        axes.set_title(f"channel {channel}: {figures}", loc="left", fontsize="medium")
        axes.set_yscale("log")  # otherwise the value of the background hides all others
    axes.set_xlabel("value")


def _draw_ranges(figure: Figure, counts: Tensor, stats: ChannelStats, low: float, high: float) -> None:
    """The range and mean ± std of each channel, over the number of the channel; and one histogram of all."""
    ranges, histogram = figure.subplots(2, 1)
    channel = torch.arange(len(counts)).numpy()
    mean, std = stats.mean.numpy(), stats.std.numpy()
    ranges.fill_between(channel, stats.min.numpy(), stats.max.numpy(), color=_OTHER, alpha=0.2, label="min to max")
    ranges.fill_between(channel, mean - std, mean + std, color=_OTHER, alpha=0.5, label="mean ± std")
    ranges.plot(channel, mean, color="black", linewidth=1.5, label="mean")
    ranges.set_xlabel("channel")
    ranges.set_ylabel("value")
    ranges.legend(frameon=False)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    histogram.stairs(counts.sum(0).numpy(), edges.numpy(), fill=True, color=_OTHER)
    histogram.set_title(f"all {len(counts)} channels", loc="left", fontsize="medium")
    histogram.set_yscale("log")
    histogram.set_xlabel("value")
    histogram.set_ylabel("number of values")
    for axes in (ranges, histogram):
        axes.spines[["top", "right"]].set_visible(False)


def _printable(name: str) -> str:
    """The name, with the characters that the font lacks as escapes."""
    glyphs = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    return "".join(c if ord(c) in glyphs else c.encode("unicode_escape").decode() for c in name)
