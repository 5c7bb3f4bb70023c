"""ChannelStats and dataset_stats against numpy in float64. Runs on the fallback too."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import dtype_id
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import normfused
from normfused import ChannelStats, dataset_stats
from normfused.dataset import collect
from normfused.stats import Moments, Sums

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def random_images(sizes: list[tuple[int, ...]], channels: int = 3, seed: int = 0) -> list[np.ndarray]:
    """HWC images of uint8 whose channels and images differ in brightness and contrast."""
    random = np.random.default_rng(seed)
    images = []
    for size in sizes:
        values = random.normal(random.uniform(40, 200, channels), random.uniform(5, 60, channels), (*size, channels))
        images.append(values.clip(0, 255).astype(np.uint8))
    return images


SIZES = [(11, 7), (5, 5), (1, 30), (17, 4), (8, 8), (3, 2), (20, 20), (9, 1), (6, 13)]
IMAGES = random_images(SIZES)
PIXELS = np.concatenate([image.reshape(-1, 3) for image in IMAGES])  # (values, channels)


def exact_sums(pixels: np.ndarray) -> tuple[Sums, ...]:
    columns = [[int(v) for v in column] for column in pixels.T]
    return tuple(Sums(len(c), sum(c), sum(v * v for v in c), min(c), max(c)) for c in columns)


def assert_close(got: Tensor, expected: Any, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=0)


def assert_is_of_all_pixels(stats: ChannelStats) -> None:
    scaled = PIXELS / 255.0
    assert stats.sums == exact_sums(PIXELS)
    assert (stats.channels, stats.images, stats.complete) == (3, len(IMAGES), True)
    assert stats.count.tolist() == [len(PIXELS)] * 3
    assert stats.count.dtype == stats.nonfinite.dtype == torch.int64
    assert_close(stats.mean, scaled.mean(0))
    assert_close(stats.var(), scaled.var(0))
    assert_close(stats.var(correction=1), scaled.var(0, ddof=1))
    assert_close(stats.std(), scaled.std(0))
    assert_close(stats.std(correction=1), scaled.std(0, ddof=1))
    assert_close(stats.min, scaled.min(0))
    assert_close(stats.max, scaled.max(0))


# --- what the figures are ----------------------------------------------------------------------


def test_b37_images_of_different_sizes() -> None:
    stats = ChannelStats()
    for image in IMAGES:
        assert stats.update(image) is stats
    assert_is_of_all_pixels(stats)


def test_b37_not_the_mean_of_the_images_stds() -> None:
    stats = dataset_stats(IMAGES)
    mean_of_stds = np.mean([image.reshape(-1, 3).std(0) / 255 for image in IMAGES], axis=0)
    mean_of_means = np.mean([image.reshape(-1, 3).mean(0) / 255 for image in IMAGES], axis=0)
    assert (abs(stats.std().numpy() - mean_of_stds) > 0.01).all()
    assert (abs(stats.mean.numpy() - mean_of_means) > 0.001).all()
    assert_is_of_all_pixels(stats)


def test_b37_fashion_mnist() -> None:
    path = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
    if not path.is_file():
        pytest.skip(f"{path} is missing: apt install dataset-fashion-mnist")
    stats = dataset_stats(normfused.files.read_idx(path), layout="NHW", batch_size=10_000)
    assert (stats.images, stats.count.tolist()) == (60_000, [47_040_000])
    assert f"{stats.mean.item():.5f}, {stats.std().item():.5f}" == "0.28604, 0.35302"
    assert str(stats).endswith("normfused.transforms.Normalize(mean=[0.2860], std=[0.3530])")


@pytest.mark.parametrize("dtype", INTEGERS, ids=dtype_id)
def test_b38_integers_are_exact(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    # Where the extremes of a type have squares beyond int64, 64-bit sums wrap.
    values = torch.randint(max(limits.min, -(2**40)), min(limits.max, 2**40) + 1, (4, 2, 9, 5))
    values[0, :, 0, 0] = limits.min
    values[0, 1, 0, 1] = limits.max
    stats = ChannelStats(scale=0.5).update(values.to(dtype))
    exact = exact_sums(values.movedim(1, -1).reshape(-1, 2).numpy())
    assert stats.sums == exact
    for channel, (count, total, squares, low, high) in enumerate(exact):
        variance = Fraction(squares, count) - Fraction(total, count) ** 2
        assert stats.mean[channel].item() == pytest.approx(float(Fraction(total, count) / 2), rel=1e-14)
        assert stats.var()[channel].item() == pytest.approx(float(variance / 4), rel=1e-14)
        assert stats.min[channel].item() == low / 2
        assert stats.max[channel].item() == high / 2


def test_b38_nothing_cancels() -> None:
    x = torch.tensor([2**31 - 3, 2**31 - 2, 2**31 - 1]).view(1, 1, 3, 1)
    assert_close(ChannelStats().update(x.int()).var(), [2 / 3], rtol=1e-15)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_b37_floats(dtype: torch.dtype) -> None:
    x = (torch.randn(6, 3, 10, 9) * 2 + 5).to(dtype)
    stats = ChannelStats()
    for part in x.split([1, 3, 2]):
        stats.update(part)
    rows = x.double().transpose(0, 1).flatten(1)
    assert stats.sums == ()
    assert stats.count.tolist() == [540] * 3
    # Parts of narrow types may be added up in float32.
    rtol = 1e-12 if dtype == torch.float64 else 2e-6
    assert_close(stats.mean, rows.mean(1), rtol)
    assert_close(stats.var(), rows.var(1, correction=0), rtol)
    assert torch.equal(stats.min, rows.amin(1))
    assert torch.equal(stats.max, rows.amax(1))


def test_b37_a_large_mean_costs_no_digits() -> None:
    x = torch.randn(8, 1, 50, 50, dtype=torch.float64) + 1e6
    stats = ChannelStats()
    for image in x:
        stats.update(image)
    assert_close(stats.var(), [x.numpy().var()], rtol=1e-9)


def test_b37_integers_and_floats_together() -> None:
    stats = ChannelStats().update(IMAGES[0]).update(torch.full((3, 4, 4), 2.0)).update(IMAGES[1])
    pixels = np.concatenate([*(i.reshape(-1, 3) / 255.0 for i in IMAGES[:2]), np.full((16, 3), 2.0)])
    assert stats.count.tolist() == [len(pixels)] * 3
    assert_close(stats.mean, pixels.mean(0))
    assert_close(stats.std(), pixels.std(0))
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
def test_b37_scale(dtype: torch.dtype, scale: float | None, factor: float) -> None:
    x = torch.randint(0, 100, (2, 3, 8, 8))
    stats = ChannelStats(scale).update(x.to(dtype))
    rows = x.double().transpose(0, 1).flatten(1) * factor
    for got, expected in (
        (stats.mean, rows.mean(1)),
        (stats.std(), rows.std(1, correction=0)),
        (stats.min, rows.amin(1)),
        (stats.max, rows.amax(1)),
    ):
        assert_close(got, expected)


def test_b37_white_is_one() -> None:
    assert ChannelStats().update(torch.full((1, 3, 3), 255, dtype=torch.uint8)).max.item() == 1.0


def test_b37_constant_channel() -> None:
    x = torch.full((2, 3, 5, 5), 77, dtype=torch.uint8)
    x[:, 1, 0] = 3
    for values in (x, x.float() * 0.1):
        stats = ChannelStats().update(values).update(values[:1])
        assert stats.std()[[0, 2]].tolist() == [0, 0]
        assert stats.std()[1] > 0
        assert str(stats).endswith("  # constant, with a std of 0: channel 0, 2")


def test_b37_one_value() -> None:
    stats = ChannelStats().update(np.array([[7]], dtype=np.uint8))
    assert stats.var().tolist() == [0.0]
    assert stats.var(correction=1).isnan().all()


# --- NaN and infinity --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_b15_nonfinite_values_are_left_out_and_counted(dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 6, 6).to(dtype)
    dirty = x.clone()
    dirty[0, 1, 2, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan])
    stats = ChannelStats()
    with pytest.warns(RuntimeWarning, match="hold NaN or infinity, left out of the statistics and counted"):
        stats.update(dirty)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once is enough
        stats.update(dirty[:1])
    assert stats.nonfinite.tolist() == [0, 8, 0]
    assert stats.count.tolist() == [180, 172, 180]
    for channel in range(3):
        values = torch.cat([dirty[:, channel], dirty[:1, channel]]).double()
        values = values[values.isfinite()]
        assert stats.mean[channel].item() == pytest.approx(values.mean().item(), rel=2e-6)
        assert stats.var()[channel].item() == pytest.approx(values.var(correction=0).item(), rel=2e-6)
        assert stats.min[channel] == values.min()
        assert stats.max[channel] == values.max()
    lines = str(stats).splitlines()
    assert lines[1].split() == ["channel", "count", "mean", "std", "min", "max", "nonfinite"]
    assert lines[3].split()[-1] == "8"


@pytest.mark.filterwarnings("ignore:the images hold NaN:RuntimeWarning")
def test_b15_channel_without_a_finite_value() -> None:
    nothing = torch.full((2, 4, 4), torch.nan)
    nothing[1] = 3
    stats = ChannelStats().update(nothing)
    assert stats.count.tolist() == [0, 16]
    assert stats.mean[0].isnan()
    assert stats.std()[0].isnan()
    assert stats.mean[1] == 3
    stats.update(torch.ones(2, 4, 4))
    assert stats.mean.tolist() == [1.0, 2.0]
    assert stats.min.tolist() == [1.0, 1.0]


def test_b15_dataset_stats_warns_once() -> None:
    x = torch.zeros(300, 1, 2, 2)
    x[::2, 0, 0, 0] = torch.nan
    with pytest.warns(RuntimeWarning) as warned:
        stats = dataset_stats(TensorDataset(x))
    assert stats.nonfinite.tolist() == [150]
    assert len([w for w in warned if "NaN" in str(w.message)]) == 1


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
def test_b37_merge_is_associative_and_commutative(parameters: list[tuple[int, int, int]], data: Any) -> None:
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
def test_b37_merge_of_floats_is_associative_to_rounding(parameters: list[tuple[int, int, int]], cut: int) -> None:
    images = images_from(parameters, torch.float64)
    whole, parts = stats_of(images), stats_of(images[cut:]).merge(stats_of(images[:cut]))
    assert parts.count.tolist() == whole.count.tolist()
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(parts.var(), whole.var(), rtol=1e-12, atol=1e-12)
    assert torch.equal(parts.max, whole.max)


def test_b37_merge_leaves_the_other_as_it_is() -> None:
    a, b = stats_of(images_from([(3, 3, 1)], torch.uint8)), stats_of(images_from([(4, 2, 2)], torch.uint8))
    before = pickle.dumps(b)
    assert a.merge(b) is a
    assert pickle.loads(before) == b
    assert a.images == 2
    assert ChannelStats().merge(b) == b
    assert a.merge(ChannelStats()).images == 2


def test_b37_equality() -> None:
    a, b = ChannelStats().update(IMAGES[0]), ChannelStats().update(IMAGES[0])
    assert a == b
    assert a != b.update(IMAGES[1])
    assert a != ChannelStats(scale=1).update(IMAGES[0])
    assert a != "statistics"


def test_b43_pickle_and_json_keep_every_bit(tmp_path: Path) -> None:
    stats = ChannelStats().update(IMAGES[0]).update(torch.randn(3, 7, 7, dtype=torch.float64) / 3)
    stats.complete = False
    path = tmp_path / "stats.json"
    path.write_text("before")
    stats.save(path)
    for copy in (pickle.loads(pickle.dumps(stats)), ChannelStats.from_dict(stats.to_dict()), ChannelStats.load(path)):
        assert copy == stats
        assert copy.complete is False
        assert torch.equal(copy.std(), stats.std())
        assert copy.update(IMAGES[1]) != stats
    assert [file.name for file in tmp_path.iterdir()] == ["stats.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b'{"scale": 1}', b"\xff\xfe", b"null"])
def test_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.json: not a saved ChannelStats: "):
        ChannelStats.load(path)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "truncated.json"
    ChannelStats().update(IMAGES[0]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"truncated.json: not a saved ChannelStats: "):
        ChannelStats.load(path)


# --- what an image may be ----------------------------------------------------------------------

HWC = IMAGES[0]
CHW = torch.from_numpy(HWC).permute(2, 0, 1)


class LikePillow:
    """All that is asked of a PIL image."""

    def __init__(self, array: np.ndarray, mode: str = "RGB") -> None:
        self.mode = mode
        self.__array_interface__ = array.__array_interface__


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("images", "layout", "count"),
    [
        (CHW, None, 1),
        (CHW.contiguous(), None, 1),
        (CHW.contiguous(), "CHW", 1),
        (CHW.contiguous().numpy(), "CHW", 1),
        (torch.from_numpy(HWC), "HWC", 1),
        (torch.from_numpy(HWC)[None], "NHWC", 1),
        (CHW[None].expand(2, -1, -1, -1), None, 2),
        (HWC, None, 1),
        (HWC[None], None, 1),
        (HWC[::-1], None, 1),
        (read_only(HWC), None, 1),
        (np.asfortranarray(HWC), None, 1),
        (LikePillow(HWC), None, 1),
        (HWC.reshape(-1, 3), "NC", HWC.shape[0] * HWC.shape[1]),
    ],
)
def test_b43_layouts(images: Any, layout: str | None, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = ChannelStats().update(images, layout)
    expected = exact_sums(HWC.reshape(-1, 3))
    copies = count if count == 2 else 1
    assert stats.sums == tuple(s if copies == 1 else s.merge(s) for s in expected)
    assert stats.images == count


@pytest.mark.parametrize(
    ("images", "layout"),
    [(HWC[..., 0], None), (CHW[0], None), (CHW[0], "HW"), (HWC[None, ..., 0], "NHW"), (HWC[..., :1], None)],
)
def test_b43_grayscale(images: Any, layout: str | None) -> None:
    stats = ChannelStats().update(images, layout)
    assert (stats.sums, stats.images) == (exact_sums(HWC[..., 0].reshape(-1, 1)), 1)


@pytest.mark.parametrize("dtype", [">u2", ">i4", ">f4", "<u2", ">f8"])
def test_b43_reversed_bytes(dtype: str) -> None:
    stats = ChannelStats(scale=1).update((HWC.astype(np.int64) + 200).astype(dtype))
    assert_close(stats.mean, HWC.reshape(-1, 3).mean(0) + 200, rtol=2e-6)


def test_b43_input_is_not_written() -> None:
    before = HWC.copy()
    ChannelStats().update(read_only(HWC)).update(HWC)
    assert (before == HWC).all()


BOOLS = "images must be of uint8, int8, int16, uint16, int32, int64, float16, bfloat16, float32 or float64, got "
OTHER_CHANNELS = "channels: got 1, but the images before have 3"
BAD_IMAGES = [
    (torch.zeros(3, 4, 4, dtype=torch.bool), None, TypeError, BOOLS + "bool"),
    (np.zeros((4, 4), dtype=bool), None, TypeError, BOOLS + "bool"),
    (torch.zeros(3, 4, 4, dtype=torch.complex64), None, TypeError, BOOLS + "complex64"),
    (np.zeros((4, 4), dtype=np.uint32), None, TypeError, BOOLS + "uint32"),
    ("picture.png", None, TypeError, BOOLS + "str352"),
    (torch.zeros(4), None, ValueError, "images need 2, 3 or 4 dimensions, got shape (4,)"),
    (np.zeros((1, 2, 3, 4, 5)), None, ValueError, "images need 2, 3 or 4 dimensions, got shape (1, 2, 3, 4, 5)"),
    (torch.zeros(3, 0, 4), None, ValueError, "images of shape (3, 0, 4) hold no values"),
    (torch.zeros(0, 3, 4, 4), None, ValueError, "images of shape (0, 3, 4, 4) hold no values"),
    (
        torch.zeros(32, 32, 3),
        None,
        ValueError,
        "images of shape (32, 32, 3) would have 32 channels as CHW, which tensors are taken for: "
        "pass layout='HWC' for 3, or layout='CHW' to insist",
    ),
    (
        np.zeros((3, 32, 32)),
        None,
        ValueError,
        "images of shape (3, 32, 32) would have 32 channels as HWC, which arrays are taken for: "
        "pass layout='CHW' for 3, or layout='HWC' to insist",
    ),
    (
        np.zeros((8, 1, 28, 28)),
        None,
        ValueError,
        "images of shape (8, 1, 28, 28) would have 28 channels as NHWC, which arrays are taken for: "
        "pass layout='NCHW' for 1, or layout='NHWC' to insist",
    ),
    (
        torch.zeros(3, 4, 4),
        "CWH",
        ValueError,
        "layout must be one of HW, CHW, HWC, NHW, NCHW, NHWC, NC, got 'CWH'",
    ),
    (
        torch.zeros(4, 4),
        "CHW",
        ValueError,
        "layout='CHW' needs 3 dimensions, got images of shape (4, 4)",
    ),
    (
        LikePillow(HWC[..., 0].copy(), "P"),
        None,
        ValueError,
        "a palette image holds indices, not colors: convert it to RGB first",
    ),
]


@pytest.mark.parametrize(
    ("images", "layout", "kind", "message"), BAD_IMAGES, ids=[case[3][-60:] for case in BAD_IMAGES]
)
def test_bad_images(images: Any, layout: str | None, kind: type[Exception], message: str) -> None:
    stats = ChannelStats()
    with pytest.raises(kind) as error:
        stats.update(images, layout)
    assert str(error.value) == message
    assert stats == ChannelStats()


def test_strange_shapes_by_layout() -> None:
    assert ChannelStats().update(torch.zeros(32, 32, 3), "CHW").channels == 32
    assert ChannelStats().update(torch.zeros(13, 32, 32)).channels == 13  # neither end is few


def test_other_number_of_channels() -> None:
    stats = ChannelStats().update(CHW)
    before = pickle.loads(pickle.dumps(stats))
    for change in (lambda: stats.update(CHW[:1]), lambda: stats.merge(ChannelStats().update(CHW[0]))):
        with pytest.raises(ValueError, match=f"^{OTHER_CHANNELS}$"):
            change()
    assert stats == before


def test_scales_that_do_not_fit() -> None:
    stats = ChannelStats().update(CHW)
    with pytest.raises(ValueError, match=r"^uint8 is scaled by 1/255, other integers by 1: pass scale= "):
        stats.update(CHW.int())
    with pytest.raises(ValueError, match=r"^cannot merge scale=1 into scale=None$"):
        stats.merge(ChannelStats(scale=1))
    both = ChannelStats(scale=1).update(CHW).update(CHW.int())
    assert both.sums == tuple(s.merge(s) for s in stats.sums)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), "1/255"])
def test_bad_scale(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"^scale must be a positive number or None, got "):
        ChannelStats(scale)


@pytest.mark.parametrize("result", ["mean", "min", "max", "count", "nonfinite", "var", "std"])
def test_nothing_yet(result: str) -> None:
    stats = ChannelStats()
    with pytest.raises(ValueError, match=r"^no images yet$"):
        getattr(stats, result)() if result in ("var", "std") else getattr(stats, result)
    assert (stats.channels, stats.images, stats.sums, str(stats)) == (None, 0, (), "no images yet")


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
def test_table_says_how_values_were_scaled(stats: Callable[[], ChannelStats], first_line: str) -> None:
    assert str(stats()).splitlines()[0] == first_line


# --- dataset_stats -----------------------------------------------------------------------------


class Items(Dataset[Any]):
    """A map-style dataset, at module level so that a spawned process finds it."""

    def __init__(self, items: list[Any], fails_at: int | None = None, error: type[BaseException] = OSError) -> None:
        self.items, self.fails_at, self.error = items, fails_at, error

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if index == self.fails_at:
            raise self.error("no such disk")
        return self.items[index]


class Threads(Items):
    """Refuses to be read where a worker has threads of its own."""

    def __getitem__(self, index: int) -> Any:
        assert torch.utils.data.get_worker_info() is not None
        assert torch.get_num_threads() == 1
        return self.items[index]


class Shard(IterableDataset[Any]):
    """Gives each worker its share."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        return iter(self.items if worker is None else self.items[worker.id :: worker.num_workers])


def batches_of_one() -> list[Tensor]:
    return [torch.from_numpy(image).permute(2, 0, 1)[None] for image in IMAGES]


@pytest.mark.parametrize(
    "data",
    [
        lambda: IMAGES,
        lambda: tuple(IMAGES),
        lambda: iter(IMAGES),
        lambda: Items(IMAGES),
        lambda: Shard(IMAGES),
        lambda: Items([(image, 7) for image in IMAGES]),
        lambda: Items([{"label": 7, "image": image} for image in IMAGES]),
        lambda: Items([{"pixel_values": image} for image in IMAGES]),
        lambda: DataLoader(Items(batches_of_one()), batch_size=None),
        lambda: DataLoader(Items([(image, 7) for image in batches_of_one()]), batch_size=None),
    ],
    ids=["list", "tuple", "iterator", "dataset", "iterable", "pairs", "dicts", "pixels", "loader", "loader of pairs"],
)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_b37_dataset_stats(data: Callable[[], Any], batch_size: int) -> None:
    assert_is_of_all_pixels(dataset_stats(data(), batch_size=batch_size))


def test_b37_key_names_the_image() -> None:
    assert_is_of_all_pixels(dataset_stats(Items([{"scan": i, "image": 1} for i in IMAGES]), key="scan"))
    assert_is_of_all_pixels(dataset_stats(Items([(7, i) for i in IMAGES]), key=1))


@pytest.mark.parametrize(
    ("data", "layout"),
    [
        (torch.from_numpy(np.stack([HWC, HWC[::-1], HWC])).permute(0, 3, 1, 2), None),
        (np.stack([HWC, HWC[::-1], HWC]), None),
        (np.stack([HWC, HWC[::-1], HWC]).transpose(0, 3, 1, 2), "NCHW"),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_b37_array_of_images(data: Any, layout: str | None, batch_size: int) -> None:
    stats = dataset_stats(data, layout=layout, batch_size=batch_size)
    assert stats.sums == tuple(s.merge(s).merge(s) for s in exact_sums(HWC.reshape(-1, 3)))
    assert stats.images == 3


def test_one_image_is_no_data_set() -> None:
    message = r"^data of shape \(60, 28, 28\) is one image as CHW: pass layout='NHW' for many grayscale ones$"
    with pytest.raises(ValueError, match=message):
        dataset_stats(torch.zeros(60, 28, 28))
    assert dataset_stats(torch.zeros(60, 28, 28), layout="NHW").images == 60


@pytest.fixture
def start_method() -> Iterator[Callable[[str], None]]:
    """Sets how processes start, and sets it back."""
    before = multiprocessing.get_start_method()
    yield lambda method: multiprocessing.set_start_method(method, force=True)
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("method", "workers"), [("fork", 4), ("spawn", 2)])
def test_b43_workers(start_method: Callable[[str], None], method: str, workers: int) -> None:
    start_method(method)
    torch.ones(1 << 20).sum()  # this process has used its threads
    assert_is_of_all_pixels(dataset_stats(Threads(IMAGES), num_workers=workers, batch_size=2))


def test_b43_workers_of_an_iterable_dataset() -> None:
    assert_is_of_all_pixels(dataset_stats(Shard(IMAGES), num_workers=2))


def test_b43_workers_give_the_same_bits() -> None:
    floats = Items([torch.randn(3, 5 + i, 9) for i in range(10)])
    assert dataset_stats(floats, num_workers=2, batch_size=3) == dataset_stats(floats, batch_size=3)


def test_b43_random_numbers_stay_as_they_are() -> None:
    state = torch.get_rng_state()
    dataset_stats(Items(IMAGES))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (lambda: Items(IMAGES, fails_at=5), RuntimeError, "item 5: OSError('no such disk')"),
        (lambda: Items(IMAGES, fails_at=5, error=ValueError), ValueError, "item 5: no such disk"),
        (lambda: Items([HWC, HWC > 3]), TypeError, f"item 1: {BOOLS}bool"),
        (lambda: Items([HWC, HWC, HWC[..., 0]]), ValueError, f"item 2: {OTHER_CHANNELS}"),
        (lambda: iter([HWC, HWC[..., 0]]), ValueError, f"item 1: {OTHER_CHANNELS}"),
        (
            lambda: Items([{"scan": HWC, "y": 3}]),
            ValueError,
            "item 0: a dict of scan, y: pass key= to say which is the image",
        ),
        (lambda: [], ValueError, "data holds no images"),
        (lambda: Items([]), ValueError, "data holds no images"),
        (lambda: iter(()), ValueError, "data holds no images"),
        (lambda: torch.zeros(0, 3, 4, 4), ValueError, "data holds no images"),
    ],
)
@pytest.mark.parametrize("batch_size", [2, 64])
def test_dataset_errors_name_the_item(
    data: Callable[[], Any], kind: type[Exception], message: str, batch_size: int
) -> None:
    with pytest.raises(kind) as error:
        dataset_stats(data(), batch_size=batch_size)
    assert str(error.value) == message


def test_error_keeps_its_cause() -> None:
    with pytest.raises(RuntimeError) as error:
        dataset_stats(Items(IMAGES, fails_at=0))
    assert isinstance(error.value.__cause__, OSError)


def test_error_in_a_worker_names_the_item() -> None:
    with pytest.raises(ValueError, match=r"item 3: no such disk"):
        dataset_stats(Items(IMAGES, fails_at=3, error=ValueError), num_workers=1, batch_size=2)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1, got 0$"):
        dataset_stats(IMAGES, batch_size=0)
    with pytest.raises(ValueError, match=r"^num_workers=2 needs a dataset or a sequence, got generator$"):
        dataset_stats((i for i in IMAGES), num_workers=2)
    with pytest.raises(ValueError, match=r"^num_workers=2 needs a dataset or a sequence, got DataLoader$"):
        dataset_stats(DataLoader(Items(IMAGES)), num_workers=2)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_b44_interrupted(batch_size: int) -> None:
    done = 5 // batch_size * batch_size
    data = Items(IMAGES, fails_at=5, error=KeyboardInterrupt)
    message = f"^interrupted: the statistics are those of {done} of {len(IMAGES)} images$"
    with pytest.warns(RuntimeWarning, match=message):
        stats = dataset_stats(data, batch_size=batch_size)
    assert not stats.complete
    assert stats.images == done
    assert stats.sums == dataset_stats(IMAGES[:done]).sums
    assert not ChannelStats().merge(stats).complete


def test_b44_interrupted_generator() -> None:
    def images() -> Iterator[np.ndarray]:
        yield from IMAGES[:3]
        raise KeyboardInterrupt

    with pytest.warns(RuntimeWarning, match="^interrupted: the statistics are those of 3 images$"):
        assert dataset_stats(images()).images == 3


def test_b44_interrupted_before_the_first() -> None:
    with pytest.warns(RuntimeWarning, match="those of 0 of 9 images"):
        stats = dataset_stats(Items(IMAGES, fails_at=0, error=KeyboardInterrupt))
    assert (stats.images, stats.complete) == (0, False)


def test_b44_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_stats(IMAGES, batch_size=4)
    assert capsys.readouterr().err == ""  # no terminal
    dataset_stats(IMAGES, batch_size=4, progress=True)
    assert "9/9" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_is_of_all_pixels(dataset_stats(IMAGES, progress=True))


def test_b37_collect_names_the_part() -> None:
    parts = [("first.png", ChannelStats().update(CHW)), ("second.png", ChannelStats().update(CHW[:1]))]
    with pytest.raises(ValueError, match=f"^second.png: {OTHER_CHANNELS}$"):
        collect(parts, None, None, False)


# --- several processes -------------------------------------------------------------------------

ALL_REDUCE = """
import sys
import numpy as np, torch
from torch import distributed
from normfused import ChannelStats

rank, store, state = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
stats = ChannelStats()
for seed in range(rank, 5, 2):  # 3 images here, 2 there
    torch.manual_seed(seed)
    stats.update(torch.randint(0, 256, (3, 4 + seed, 5), dtype=torch.uint8))
    stats.update(torch.randn(3, 4, 4))
assert stats.all_reduce() is stats
stats.save(f"{state}{rank}")
torch.manual_seed(0)
try:
    ChannelStats().update(torch.randn(1 + rank, 4, 4)).all_reduce()
except ValueError as error:
    assert str(error) == "channels: got 2, but the images before have 1", error
else:
    raise AssertionError("channels that do not fit")
distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_b37_all_reduce(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "store"), str(tmp_path / "stats")]
    command = [sys.executable, "-W", "ignore", "-c", ALL_REDUCE]
    # Not in the checkout, whose folder normfused has no extension.
    processes = [subprocess.Popen([*command, str(rank), *arguments], cwd=tmp_path) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (ChannelStats.load(f"{tmp_path}/stats{rank}") for rank in (0, 1))
    assert first == second
    alone = ChannelStats()
    for seed in (0, 2, 4, 1, 3):
        torch.manual_seed(seed)
        alone.update(torch.randint(0, 256, (3, 4 + seed, 5), dtype=torch.uint8))
        alone.update(torch.randn(3, 4, 4))
    assert first.sums == alone.sums
    assert first.images == 10
    torch.testing.assert_close(first.std(), alone.std(), rtol=1e-13, atol=0)


def test_all_reduce_without_a_group() -> None:
    with pytest.raises(RuntimeError, match=r"^all_reduce needs a process group: call torch.distributed.init_process_"):
        ChannelStats().all_reduce()


# --- a billion values --------------------------------------------------------------------------

BILLION = """
import resource
import numpy as np, torch
from normfused import ChannelStats, dataset_stats

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

rows = torch.randint(0, 256, (1000, 1000, 1000), dtype=torch.uint8)
ChannelStats().update(rows[:1, :64], layout="NHW")  # threads and their stacks
x = rows.view(1000, 500, 1000, 2)
for images, layout in ((rows, "NHW"), (x, "NHWC"), (x.view(1000, 2, 500, 1000), "NCHW"), (x.numpy(), None)):
    for whole in (True, False):
        before = peak()
        stats = ChannelStats().update(images, layout) if whole else dataset_stats(images, layout=layout)
        grown = peak() - before
        assert grown < rows.numel() / 100, (layout, whole, grown)
        assert stats.count.sum() == 10**9
        assert sum(s.sum for s in stats.sums) == (total := int(rows.numpy().sum(dtype=np.int64)))
        if layout == "NHWC":
            assert [s.sum for s in stats.sums] == [int(x.numpy()[..., c].sum(dtype=np.int64)) for c in (0, 1)]
squares = sum(int((part.astype(np.int64) ** 2).sum()) for part in rows.numpy())
assert sum(s.sum_of_squares for s in stats.sums) == squares
"""


@pytest.mark.large
@pytest.mark.usefixtures("needs_extension")
def test_b38_a_billion_bytes_in_no_more_memory(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", BILLION], check=True, timeout=900, cwd=tmp_path)


def test_moments_of_nothing() -> None:
    nothing = Moments(0, 0.0, 0.0, float("inf"), float("-inf"), 3)
    something = Moments(2, 5.0, 1.0, 4.0, 6.0, 1)
    assert nothing.merge(something) == something.merge(nothing) == Moments(2, 5.0, 1.0, 4.0, 6.0, 4)
    assert nothing.merge(nothing).count == 0
