"""ChannelStats compared with numpy in float64. Runs on the fallback too."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import dtype_id
from hypothesis import given, settings
from hypothesis import strategies as st
from pixels import CHW, IMAGES, assert_close, assert_is_of_all_pixels, exact_sums
from torch import Tensor

import normfused
from normfused import ChannelStats, dataset_stats
from normfused.data.records import Moments

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# --- values ------------------------------------------------------------------------------------


def test_images_of_different_sizes() -> None:
    stats = ChannelStats()
    for image in IMAGES:
        assert stats.update(image) is stats
    assert_is_of_all_pixels(stats)


def test_not_the_mean_of_the_images_stds() -> None:
    stats = dataset_stats(IMAGES)
    mean_of_stds = np.mean([image.reshape(-1, 3).std(0) / 255 for image in IMAGES], axis=0)
    mean_of_means = np.mean([image.reshape(-1, 3).mean(0) / 255 for image in IMAGES], axis=0)
    assert (abs(stats.std.numpy() - mean_of_stds) > 0.01).all()
    assert (abs(stats.mean.numpy() - mean_of_means) > 0.001).all()
    assert_is_of_all_pixels(stats)


def test_fashion_mnist() -> None:
    path = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
    if not path.is_file():
        pytest.skip(f"{path} is missing: apt install dataset-fashion-mnist")
    stats = dataset_stats(normfused.data.files.read_idx(path), layout="NHW", batch_size=10_000)
    assert (stats.images, stats.count.tolist()) == (60_000, [47_040_000])
    assert f"{stats.mean.item():.5f}, {stats.std.item():.5f}" == "0.28604, 0.35302"
    assert str(stats).endswith("normfused.transforms.Normalize(mean=[0.2860], std=[0.3530])")


@pytest.mark.parametrize("dtype", INTEGERS, ids=dtype_id)
def test_integers_are_exact(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    # The squares of the extremes of wide types exceed int64: sums in 64 bits would wrap around.
    values = torch.randint(max(limits.min, -(2**40)), min(limits.max, 2**40) + 1, (4, 2, 9, 5))
    values[0, :, 0, 0] = limits.min
    values[0, 1, 0, 1] = limits.max
    stats = ChannelStats(scale=0.5).update(values.to(dtype))
    exact = exact_sums(values.movedim(1, -1).reshape(-1, 2).numpy())
    assert stats.sums == exact
    for channel, (count, total, squares, low, high, _) in enumerate(exact):
        variance = Fraction(squares, count) - Fraction(total, count) ** 2
        assert stats.mean[channel].item() == pytest.approx(float(Fraction(total, count) / 2), rel=1e-14)
        assert stats.var[channel].item() == pytest.approx(float(variance / 4), rel=1e-14)
        assert stats.min[channel].item() == low / 2
        assert stats.max[channel].item() == high / 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_id)
def test_extreme_integers_are_exact(dtype: torch.dtype) -> None:
    """Every value is an extreme: sums of squares take more than 64 bits, and for int64 more than 128."""
    limits = torch.iinfo(dtype)
    values = torch.tensor([limits.min, limits.max, limits.min, limits.max - 1] * 30, dtype=dtype).view(2, 3, 4, 5)
    exact = exact_sums(values.movedim(1, -1).reshape(-1, 3).numpy())
    assert ChannelStats(scale=1.0).update(values).sums == exact
    assert tuple(ChannelStats(scale=1.0).update(values.movedim(1, -1).contiguous(), "NHWC").sums) == exact


def test_many_integers_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(-(2**40), 2**40, (1, 2, 70, 3))
    whole = ChannelStats(scale=1.0).update(values)
    monkeypatch.setattr(normfused.data.records, "_MAX_VALUES", 16)
    assert ChannelStats(scale=1.0).update(values) == whole
    small = (values % 100).to(torch.int16)
    monkeypatch.undo()
    counted = ChannelStats(quantiles=(0.5,)).update(small)
    monkeypatch.setattr(normfused.data.records, "_MAX_VALUES", 16)
    assert ChannelStats(quantiles=(0.5,)).update(small) == counted
    assert ChannelStats(quantiles=(0.5,)).update(small.float()).histograms == counted.histograms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_id)
def test_any_magnitude(dtype: torch.dtype) -> None:
    """A power of two scales every figure, over the whole range of the dtype, in one update and in many."""
    x = torch.tensor([-24.0, -9.0, -8.0, -1.0, 0.0, 3.0, 16.0, 31.0], dtype=torch.float64).repeat(12).view(4, 3, 8)
    expected = ChannelStats().update(x.unsqueeze(-1))
    smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    exponents = range(math.ceil(math.log2(smallest)), math.floor(math.log2(largest)) - 5, 7)
    assert len(exponents) * 7 / math.log2(10) > 70
    for exponent in exponents:
        scaled = torch.ldexp(x, torch.tensor(exponent)).to(dtype).unsqueeze(-1)
        whole, parts = ChannelStats().update(scaled), ChannelStats()
        for image in scaled:
            parts.update(image)
        for stats in (whole, parts):
            for name in ("mean", "std", "min", "max"):
                figure = torch.ldexp(getattr(stats, name), torch.tensor(-exponent))
                assert_close(figure, getattr(expected, name).tolist(), rtol=1e-6 if dtype != torch.float64 else 1e-14)


def test_a_range_beyond_the_largest_number() -> None:
    largest = torch.finfo(torch.float64).max
    x = torch.tensor([-largest, largest, largest, -largest], dtype=torch.float64).view(4, 1, 1, 1)
    whole, parts = ChannelStats().update(x), ChannelStats()
    for image in x:
        parts.update(image)
    for stats in (whole, parts):
        assert (stats.min.item(), stats.max.item()) == (-largest, largest)
        assert stats.mean.item() == pytest.approx(0, abs=1e-15 * largest)
        assert stats.std.item() == pytest.approx(largest)
    assert "Normalize(mean=[0.0000], std=[1.798e+308])" in str(whole)
    constant = ChannelStats().update(x[1:3])
    assert (constant.mean.item(), constant.std.item()) == (largest, 0)


def test_no_cancellation() -> None:
    x = torch.tensor([2**31 - 3, 2**31 - 2, 2**31 - 1]).view(1, 1, 3, 1)
    assert_close(ChannelStats().update(x.int()).var, [2 / 3], rtol=1e-15)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_floats(dtype: torch.dtype) -> None:
    x = (torch.randn(6, 3, 10, 9) * 2 + 5).to(dtype)
    stats = ChannelStats()
    for part in x.split([1, 3, 2]):
        stats.update(part)
    rows = x.double().transpose(0, 1).flatten(1)
    assert stats.sums == ()
    assert stats.count.tolist() == [540] * 3
    # Values of narrow types may be summed in float32.
    rtol = 1e-12 if dtype == torch.float64 else 2e-6
    assert_close(stats.mean, rows.mean(1), rtol)
    assert_close(stats.var, rows.var(1, correction=0), rtol)
    assert torch.equal(stats.min, rows.amin(1))
    assert torch.equal(stats.max, rows.amax(1))


def test_a_large_mean_loses_no_digits() -> None:
    x = torch.randn(8, 1, 50, 50, dtype=torch.float64) + 1e6
    stats = ChannelStats()
    for image in x:
        stats.update(image)
    assert_close(stats.var, [x.numpy().var()], rtol=1e-9)


def test_integers_and_floats_together() -> None:
    stats = ChannelStats().update(IMAGES[0]).update(torch.full((3, 4, 4), 2.0)).update(IMAGES[1])
    pixels = np.concatenate([*(i.reshape(-1, 3) / 255.0 for i in IMAGES[:2]), np.full((16, 3), 2.0)])
    assert stats.count.tolist() == [len(pixels)] * 3
    assert_close(stats.mean, pixels.mean(0))
    assert_close(stats.std, pixels.std(0))
    assert_close(stats.min, pixels.min(0))
    assert stats.max.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("dtype", "scale", "factor"),
    [
        (torch.uint8, None, 1 / 255),
        (torch.uint8, 1.0, 1.0),
        (torch.int16, None, 1.0),
        (torch.int16, 1 / 100, 1 / 100),
        (torch.float64, None, 1.0),
        (torch.float64, 4, 4),
    ],
)
def test_scale(dtype: torch.dtype, scale: float | None, factor: float) -> None:
    x = torch.randint(0, 100, (2, 3, 8, 8))
    stats = ChannelStats(scale).update(x.to(dtype))
    rows = x.double().transpose(0, 1).flatten(1) * factor
    for got, expected in (
        (stats.mean, rows.mean(1)),
        (stats.std, rows.std(1, correction=0)),
        (stats.min, rows.amin(1)),
        (stats.max, rows.amax(1)),
    ):
        assert_close(got, expected)


def test_white_is_one() -> None:
    assert ChannelStats().update(torch.full((1, 3, 3), 255, dtype=torch.uint8)).max.item() == 1.0


def test_constant_channel() -> None:
    x = torch.full((2, 3, 5, 5), 77, dtype=torch.uint8)
    x[:, 1, 0] = 3
    for values in (x, x.float() * 0.1):
        stats = ChannelStats().update(values).update(values[:1])
        assert stats.std[[0, 2]].tolist() == [0, 0]
        assert stats.std[1] > 0
        assert str(stats).endswith("  # constant, with a std of 0: channel 0, 2")


def test_one_value() -> None:
    stats = ChannelStats().update(np.array([[7]], dtype=np.uint8))
    assert stats.var.tolist() == [0.0]
    assert (stats.m2 / (stats.count - 1)).isnan().all()


# --- NaN and infinity --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_nonfinite_values_are_excluded_and_counted(dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 6, 6).to(dtype)
    dirty = x.clone()
    dirty[0, 1, 2, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan])
    stats = ChannelStats()
    with pytest.warns(RuntimeWarning, match="contain NaN or infinity; the statistics exclude them"):
        stats.update(dirty)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning is given once
        stats.update(dirty[:1])
    assert stats.nonfinite.tolist() == [0, 8, 0]
    assert stats.count.tolist() == [180, 172, 180]
    for channel in range(3):
        values = torch.cat([dirty[:, channel], dirty[:1, channel]]).double()
        values = values[values.isfinite()]
        assert stats.mean[channel].item() == pytest.approx(values.mean().item(), rel=2e-6)
        assert stats.var[channel].item() == pytest.approx(values.var(correction=0).item(), rel=2e-6)
        assert stats.min[channel] == values.min()
        assert stats.max[channel] == values.max()
    lines = str(stats).splitlines()
    assert lines[1].split() == ["channel", "count", "mean", "std", "min", "max", "nonfinite"]
    assert lines[3].split()[-1] == "8"


@pytest.mark.filterwarnings("ignore:the images contain NaN:RuntimeWarning")
def test_channel_without_a_finite_value() -> None:
    nothing = torch.full((2, 4, 4), torch.nan)
    nothing[1] = 3
    stats = ChannelStats().update(nothing)
    assert stats.count.tolist() == [0, 16]
    assert stats.mean[0].isnan()
    assert stats.std[0].isnan()
    assert stats.mean[1] == 3
    stats.update(torch.ones(2, 4, 4))
    assert stats.mean.tolist() == [1.0, 2.0]
    assert stats.min.tolist() == [1.0, 1.0]


# --- any split, any order, any merge -----------------------------------------------------------

images_strategy = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32)), min_size=1, max_size=8
)


def images_from(parameters: list[tuple[int, int, int]], dtype: torch.dtype) -> list[Tensor]:
    images = []
    for height, width, seed in parameters:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(0, 256, (2, height, width), generator=generator)
        images.append(values.to(dtype))
    return images


def stats_of(images: list[Tensor]) -> ChannelStats:
    stats = ChannelStats()
    for image in images:
        stats.update(image)
    return stats


@settings(deadline=None, max_examples=60)
@given(images_strategy, st.data())
def test_merge_is_associative_and_commutative(parameters: list[tuple[int, int, int]], data: Any) -> None:
    images = images_from(parameters, torch.uint8)
    whole = stats_of(images)
    first, second = sorted(data.draw(st.tuples(*[st.integers(0, len(images))] * 2)))
    shuffled = data.draw(st.permutations(images))
    a, b, c = (
        (lambda: stats_of(shuffled[:first])),
        (lambda: stats_of(shuffled[first:second])),
        lambda: stats_of(shuffled[second:]),
    )
    assert a().merge(b()).merge(c()) == whole
    assert a().merge(b().merge(c())) == whole
    assert c().merge(a()).merge(b()) == whole


@settings(deadline=None, max_examples=60)
@given(images_strategy, st.integers(0, 8))
def test_merge_of_floats_is_associative_up_to_rounding(parameters: list[tuple[int, int, int]], cut: int) -> None:
    images = images_from(parameters, torch.float64)
    whole, parts = stats_of(images), stats_of(images[cut:]).merge(stats_of(images[:cut]))
    assert parts.count.tolist() == whole.count.tolist()
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(parts.var, whole.var, rtol=1e-12, atol=1e-12)
    assert torch.equal(parts.max, whole.max)


def test_merge_does_not_change_the_other() -> None:
    a, b = stats_of(images_from([(3, 3, 1)], torch.uint8)), stats_of(images_from([(4, 2, 2)], torch.uint8))
    before = pickle.dumps(b)
    assert a.merge(b) is a
    assert pickle.loads(before) == b
    assert a.images == 2
    assert ChannelStats().merge(b) == b
    assert a.merge(ChannelStats()).images == 2


def test_equality() -> None:
    a, b = ChannelStats().update(IMAGES[0]), ChannelStats().update(IMAGES[0])
    assert a == b
    assert a != b.update(IMAGES[1])
    assert a != ChannelStats(scale=1).update(IMAGES[0])
    assert a != "statistics"


def test_pickle_and_json_are_bitwise_exact(tmp_path: Path) -> None:
    stats = ChannelStats().update(IMAGES[0]).update(torch.randn(3, 7, 7, dtype=torch.float64) / 3)
    stats.complete = False
    path = tmp_path / "stats.json"
    path.write_text("before")
    stats.save(path)
    for copy in (pickle.loads(pickle.dumps(stats)), ChannelStats.from_dict(stats.to_dict()), ChannelStats.load(path)):
        assert copy == stats
        assert copy.complete is False
        assert torch.equal(copy.std, stats.std)
        assert copy.update(IMAGES[1]) != stats
    assert [file.name for file in tmp_path.iterdir()] == ["stats.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b'{"scale": 1}', b"\xff\xfe", b"null", b"[" * 100_000])
def test_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.json: not a saved ChannelStats: "):
        ChannelStats.load(path)


CHANNEL = ("moments", 0)
HISTOGRAM = (*CHANNEL, "histogram")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("images",), "abc"),
        (("images",), -3),
        (("complete",), 5),
        (("integer_scale",), 0.5),
        (("moments",), []),
        ((*CHANNEL, "count"), "1/0"),
        ((*CHANNEL, "count"), "1e99999999"),
        ((*CHANNEL, "count"), 5),
        ((*CHANNEL, "count"), 2**128),
        ((*CHANNEL, "other"), 0),
        ((*CHANNEL, "mean"), "1/3"),
        ((*CHANNEL, "mean"), math.nan),
        ((*CHANNEL, "std"), -1.0),
        ((*CHANNEL, "min"), 2.0),
        ((*CHANNEL, "nonfinite"), -1),
        (HISTOGRAM, None),
        ((*HISTOGRAM, "counts"), [2**70]),
        ((*HISTOGRAM, "counts"), [1]),
        ((*HISTOGRAM, "counts"), [5, -1]),
        ((*HISTOGRAM, "values"), [1.0, 0.0]),
        ((*HISTOGRAM, "values"), ["0", "1"]),
    ],
)
def test_figures_that_no_images_have(tmp_path: Path, place: tuple[str | int, ...], value: object) -> None:
    path = tmp_path / "forged.json"
    figures = ChannelStats(quantiles=[0.5]).update(torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])).to_dict()
    part: Any = figures
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    path.write_text(json.dumps(figures))
    with pytest.raises(ValueError, match=r"forged.json: not a saved ChannelStats: "):
        ChannelStats.load(path)


@pytest.mark.parametrize(
    "change", [{"sum": 9}, {"sum_of_squares": 1}, {"count": 1}, {"min": 3}, {"sum": 1.5}, {"max": True}, {"max": 2**63}]
)
def test_sums_that_no_integers_have(change: dict[str, float]) -> None:
    figures = ChannelStats().update(torch.tensor([[[0, 1], [2, 3]]])).to_dict()
    figures["sums"][0] |= change
    with pytest.raises(ValueError, match=r"no values have|^\w+="):
        ChannelStats.from_dict(figures)


def test_a_figure_that_is_missing() -> None:
    figures = ChannelStats().update(torch.ones(1, 2, 2)).to_dict()
    del figures["moments"][0]["nonfinite"]
    with pytest.raises(ValueError, match="fields count, mean, std, min, max, histogram instead of"):
        ChannelStats.from_dict(figures)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "truncated.json"
    ChannelStats().update(IMAGES[0]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"truncated.json: not a saved ChannelStats: "):
        ChannelStats.load(path)


def test_moments_of_no_values() -> None:
    nothing = Moments(0, 0.0, 0.0, float("inf"), float("-inf"), 3)
    something = Moments(2, 5.0, 1.0, 4.0, 6.0, 1)
    assert nothing.merge(something) == something.merge(nothing) == Moments(2, 5.0, 1.0, 4.0, 6.0, 4)
    assert nothing.merge(nothing).count == 0


# --- the table ---------------------------------------------------------------------------------


def test_table() -> None:
    x = torch.zeros(2, 2, 100, 100)
    x[:, 0, ::2] = 1
    x[:, 1, 0, 0] = 0.002
    assert str(ChannelStats().update(x)) == (
        "2 images\n"
        "channel   count       mean        std     min       max\n"
        "      0  20,000     0.5000     0.5000  0.0000    1.0000\n"
        "      1  20,000  2.000e-07  2.000e-05  0.0000  0.002000\n"
        "normfused.transforms.Normalize(mean=[0.5000, 2.000e-07], std=[0.5000, 2.000e-05])"
    )


@pytest.mark.parametrize(
    ("stats", "first_line"),
    [
        (lambda: ChannelStats().update(CHW), "1 image, values divided by 255"),
        (lambda: ChannelStats(scale=0.5).update(CHW).update(CHW.float()), "2 images, values divided by 2"),
        (lambda: ChannelStats().update(CHW).update(CHW.float()), "2 images, integers divided by 255"),
        (lambda: ChannelStats().update(CHW.int()), "1 image"),
    ],
)
def test_table_names_the_scale_of_values(stats: Callable[[], ChannelStats], first_line: str) -> None:
    assert str(stats()).splitlines()[0] == first_line


def test_repr_names_images_channels_mean_and_std() -> None:
    assert repr(ChannelStats()) == "ChannelStats(images=0)"
    stats = ChannelStats().update(torch.tensor([[[0, 255]], [[255, 255]]], dtype=torch.uint8))
    assert repr(stats) == "ChannelStats(images=1, channels=2, mean=[0.5000, 1.0000], std=[0.5000, 0.0000])"


# --- the printed transform ---------------------------------------------------------------------


def printed_transform(stats: ChannelStats) -> torch.nn.Module:
    line = str(stats).splitlines()[-1]
    assert line.startswith("normfused.transforms.Normalize(")
    transform: torch.nn.Module = eval(line, {"normfused": normfused})
    return transform


@pytest.mark.parametrize("layout", ["HW", "CHW", "HWC", "NHW", "NCHW", "NHWC"])
@pytest.mark.parametrize("scale", [None, 1 / 255, 1 / 65535, 1e-9, 2.5], ids=str)
@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS], ids=dtype_id)
def test_the_printed_transform_normalizes_the_images(dtype: torch.dtype, scale: float | None, layout: str) -> None:
    sizes = {"N": 4, "C": 3, "H": 20, "W": 30}
    if dtype.is_floating_point:
        images = (torch.randn([sizes[d] for d in layout]) * 40 + 1000).to(dtype)
    else:
        limits = torch.iinfo(dtype)
        values = np.random.default_rng(0).integers(limits.min // 2, limits.max // 2, [sizes[d] for d in layout])
        images = torch.tensor(values).to(dtype)
    transform = printed_transform(ChannelStats(scale).update(images, layout))
    for name in "CN":
        if name not in layout:
            images, layout = images.unsqueeze(0), name + layout
    y = transform(images.movedim(layout.index("C"), 1))
    assert y.dtype == (dtype if dtype.is_floating_point else torch.float32)
    exact = y.double()
    rounding = 0.1 if dtype in (torch.float16, torch.bfloat16) else 0.005  # of the output
    assert exact.mean((0, 2, 3)).abs().max() < rounding
    assert (exact.std((0, 2, 3), correction=0) - 1).abs().max() < rounding


@pytest.mark.parametrize("std", [1e-9, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("mean", [0.0, 0.0123456789, 1234.56789])
def test_the_printed_mean_is_precise_relative_to_the_deviation(mean: float, std: float) -> None:
    x = torch.randn(1, 1, 100, 100, dtype=torch.float64) * std + mean
    y = printed_transform(ChannelStats().update(x))(x)
    assert abs(y.mean().item()) < 2e-3
    assert abs(y.std(correction=0).item() - 1) < 1e-3


def test_the_printed_scale() -> None:
    x = torch.tensor([[[0, 1]]], dtype=torch.int16)
    lines = [str(ChannelStats(scale).update(x)).splitlines()[-1] for scale in (None, 1 / 65535, 0.3, 2.0)]
    ends = [line.partition("]")[2].partition("]")[2] for line in lines]
    assert ends == [")", ", scale=1/65535)", ", scale=0.3)", ", scale=2.0)"]
