"""Values that are left out of the statistics: masks, NumPy masked arrays and nodata."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stats_runs import expected, run

import normfused
from normfused import ChannelStats, dataset_stats
from normfused.cli.stats import histogram
from normfused.data.paths import open_source
from normfused.data.sources import Options

RANDOM = np.random.default_rng(0)
DTYPES = ["uint8", "int16", "uint16", "int32", "int64", "float16", "float32", "float64"]


def pixels(dtype: str = "uint8", shape: tuple[int, ...] = (4, 6, 5, 3)) -> np.ndarray:
    return RANDOM.integers(0, 200, shape).astype(dtype)


def assert_is_of(stats: ChannelStats, channels: list[np.ndarray], scale: float) -> None:
    """Statistics of the values of each channel."""
    assert stats.count.tolist() == [len(values) for values in channels]
    for channel, values in enumerate(channels):
        wide = values.astype(np.float64) * scale
        assert stats.mean[channel].item() == pytest.approx(wide.mean(), rel=1e-6)
        assert stats.std[channel].item() == pytest.approx(wide.std(), rel=1e-5)
        assert (stats.min[channel].item(), stats.max[channel].item()) == pytest.approx((wide.min(), wide.max()))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "HWCN"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask(dtype: str, per_channel: bool, layout: str) -> None:
    images = pixels(dtype)
    mask = RANDOM.random(images.shape if per_channel else images.shape[:3]) < 0.6
    channels = [images[..., c][mask[..., c] if per_channel else mask] for c in range(3)]
    order = ["NHWC".index(letter) for letter in layout]
    arranged = images.transpose(order)
    arranged_mask = mask.transpose([i for i in order if per_channel or i != 3])
    for given in (arranged_mask, torch.from_numpy(arranged_mask.copy())):
        stats = ChannelStats().update(arranged, layout, mask=given)
        assert_is_of(stats, channels, 1 / 255 if dtype == "uint8" else 1)
        assert stats.images == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_nodata(dtype: str) -> None:
    images = pixels(dtype)
    images[RANDOM.random(images.shape) < 0.3] = 77
    channels = [images[..., c][images[..., c] != 77] for c in range(3)]
    stats = ChannelStats(nodata=77)
    for image in images:
        stats.update(image)
    assert_is_of(stats, channels, 1 / 255 if dtype == "uint8" else 1)
    assert stats == dataset_stats(images, nodata=77) or dtype.startswith("float")
    assert ChannelStats(nodata=-9999).update(images) != ChannelStats().update(images)
    assert ChannelStats(nodata=-9999).update(images).sums == ChannelStats().update(images).sums


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int64"])
@pytest.mark.parametrize("nodata", [-9999, 300, 1e300, 44.5, 2**63])
def test_a_nodata_that_the_dtype_lacks_leaves_nothing_out(dtype: str, nodata: float) -> None:
    """Compared as an integer of 8 bits, -9999 would be 241, and 300 be 44."""
    limits = np.iinfo(dtype)
    values = np.arange(max(limits.min, -500), min(limits.max, 500) + 1)
    images = values[values != nodata].astype(dtype).reshape(1, -1, 1, 1)
    stats = ChannelStats(nodata=nodata).update(images)
    assert stats.sums == ChannelStats().update(images).sums


def test_the_lowest_float_is_a_common_nodata() -> None:
    lowest = float(np.finfo(np.float32).min)
    images = torch.rand(2, 1, 4, 4)
    kept = images.clone()
    images[0, 0, 1] = lowest
    stats = ChannelStats(nodata=lowest).update(images)
    assert stats.count.tolist() == [28]
    assert stats.max.item() == torch.cat([kept[0, 0, [0, 2, 3]], kept[1, 0]]).max().item()
    assert stats.min.item() >= 0


def test_masks_of_all_kinds_add_up() -> None:
    images = pixels("float32")
    images[0, 0, 0] = np.nan
    images[1, 1] = 5
    hidden = RANDOM.random(images.shape) < 0.2
    mask = RANDOM.random(images.shape[:3]) < 0.7
    kept = ~hidden & mask[..., None] & (images != 5)
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        stats = ChannelStats(nodata=5).update(np.ma.masked_array(images, hidden), mask=mask)
    finite = kept & np.isfinite(images)
    assert_is_of(stats, [images[..., c][finite[..., c]] for c in range(3)], 1)
    assert stats.nonfinite.tolist() == [(kept & ~finite)[..., c].sum() for c in range(3)]
    assert ChannelStats().update(np.ma.masked_array(pixels(), False)).count.tolist() == [120] * 3


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32"])
def test_nothing_is_left(dtype: str) -> None:
    stats = ChannelStats(nodata=0).update(np.zeros((2, 4, 4, 3), dtype))
    assert stats.count.tolist() == [0, 0, 0]
    assert stats.mean.isnan().all()
    assert stats.std.isnan().all()
    assert (stats.min.tolist(), stats.max.tolist()) == ([np.inf] * 3, [-np.inf] * 3)
    whole = stats.merge(ChannelStats(nodata=0).update(pixels(dtype) + 1))
    assert whole.count.tolist() == [120] * 3
    assert whole.mean.isfinite().all()


def test_saved_merged_and_pickled(tmp_path: Path) -> None:
    stats = ChannelStats(nodata=3).update(pixels())
    stats.save(tmp_path / "stats.json")
    for again in (ChannelStats.load(tmp_path / "stats.json"), pickle.loads(pickle.dumps(stats))):
        assert again == stats
        assert again.nodata == 3
    with pytest.raises(ValueError, match="cannot merge nodata=None into nodata=3"):
        stats.merge(ChannelStats())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": np.ones((4, 6, 5))}, TypeError, "mask must be a bool tensor or array, got float64"),
        ({"mask": [True]}, TypeError, "mask must be a bool tensor or array, got list"),
        (
            {"mask": np.ones((6, 5), bool)},
            ValueError,
            r"mask must have the shape \(4, 6, 5, 3\) of the images, or \(4, 6, 5\), got \(6, 5\)",
        ),
    ],
)
def test_bad_masks(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    stats = ChannelStats()
    with pytest.raises(error, match=message):
        stats.update(pixels(), **arguments)
    assert stats == ChannelStats()


@pytest.mark.parametrize("nodata", [float("nan"), float("inf"), "0", torch.tensor(1)])
def test_bad_nodata(nodata: Any) -> None:
    with pytest.raises(ValueError, match="nodata must be a finite number or None, got"):
        ChannelStats(nodata=nodata)


def test_masked_arrays_are_not_normalized() -> None:
    """A transform cannot leave values out."""
    masked = np.ma.masked_array(pixels(shape=(4, 5, 3)), pixels(shape=(4, 5, 3)) > 100)
    with pytest.raises(ValueError, match="a masked array with"):
        normfused.transforms.Standardize()(masked)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = pixels()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    out = tmp_path / "out.json"
    stats = ChannelStats(nodata=7).update(images)
    done = run(capsys, tmp_path, "--nodata", 7, "--json", out, "--plot", tmp_path / "out.svg.png")
    assert done[:2] == (0, f"{stats}\n")
    written = json.loads(out.read_text())
    assert written["settings"]["nodata"] == 7
    assert ChannelStats.load(out) == stats
    with pytest.raises(SystemExit):
        run(capsys, tmp_path, "--nodata", "nan")
    assert "argument --nodata: must be finite, got nan" in capsys.readouterr().err
    assert stats != expected(list(images))


def test_histograms_leave_the_same_values_out(tmp_path: Path) -> None:
    images = pixels("int16")
    np.save(tmp_path / "images.npy", images)
    source = open_source([tmp_path / "images.npy"], Options())
    counts = histogram.Counts(source, ChannelStats(nodata=7), -0.5, 255.5)[0]
    for channel in range(3):
        values = images[..., channel]
        assert counts[channel].tolist() == np.bincount(values[values != 7], minlength=256).tolist()
