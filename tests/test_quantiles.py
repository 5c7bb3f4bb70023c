"""Histograms, quantiles and weights of images. Runs on the fallback too."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks
from stats_runs import run
from torch import Tensor, distributed

import normfused
from normfused import ChannelStats, dataset_stats, reference
from normfused.data.histogram import Histogram, histograms_of
from normfused.transforms import MinMaxNormalize, QuantileNormalize

RANDOM = np.random.default_rng(0)
Q = (0.0, 0.01, 0.25, 1 / 3, 0.5, 0.9, 0.99, 1.0)
EXACT = ["uint8", "int8", "int16", "uint16", "float16"]
ROUNDED = ["float32", "float64"]
LAYOUTS = {"NCHW": (0, 1, 2, 3), "NHWC": (0, 2, 3, 1), "HWCN": (2, 3, 1, 0)}


def pixels(dtype: str, shape: tuple[int, ...] = (5, 3, 40, 30), seed: int = 0) -> np.ndarray:
    """Images of shape (N, C, H, W): integers of all magnitudes of the dtype, or normal values."""
    random = np.random.default_rng(seed)
    if dtype.startswith("float"):
        return (random.standard_normal(shape) * 10.0 ** random.integers(-3, 3, shape)).astype(dtype)
    limits = np.iinfo(dtype)
    return random.integers(limits.min, limits.max, shape, dtype, endpoint=True) >> random.integers(0, 8, shape, dtype)


def quantiles_of(images: np.ndarray, q: Any = Q) -> np.ndarray:
    """NumPy's quantiles of each channel of images of shape (N, C, H, W), in float64."""
    return np.stack([np.quantile(images[:, c].astype(np.float64), q) for c in range(images.shape[1])], axis=-1)


def special_values(dtype: torch.dtype) -> Tensor:
    """Values at which rounding, signs or ranges change, in random order."""
    if dtype.is_floating_point:
        limits = torch.finfo(dtype)
        ends = [
            0.0,
            -0.0,
            torch.inf,
            -torch.inf,
            torch.nan,
            limits.max,
            limits.min,
            limits.tiny,
            limits.smallest_normal,
        ]
        ends += [limits.tiny / 8, -limits.tiny / 8, 1.0, 1 + limits.eps, 1 - limits.eps, 2047.0, 2049.0, 65535.0]
        near = [1 + sign * 2.0**-11 + step for sign in (-1, 1) for step in (-limits.eps, 0, limits.eps)]
        return torch.tensor([*ends, *near], dtype=torch.float64).to(dtype)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    around = [n + d for n in (0, -(2**15), 2**16, 2**20, -(2**20), 2**20 + 2**9) for d in (-2, -1, 0, 1, 2)]
    return torch.tensor([low, low + 1, high, high - 1, *(n for n in around if low <= n <= high)], dtype=dtype)


DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 5, 7),
        (1, 1, 1, 9),
        (3, 40, 4, 4),
        (700, 2, 1, 1),
        pytest.param((2, 3, 700, 701), marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_histograms_match_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    special = special_values(dtype)
    x = special[torch.randint(len(special), shape, generator=torch.Generator().manual_seed(1))]
    layouts = [x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x.expand(2, *shape).flatten(0, 1)]
    for images in layouts:
        found = histograms_of(images)
        values, counts, sizes = reference.value_counts(images)
        expected = map(
            Histogram, np.split(values.numpy(), sizes.cumsum(0)[:-1]), np.split(counts.numpy(), sizes.cumsum(0)[:-1])
        )
        assert found == tuple(expected)
        assert sum(int(h.counts.sum()) for h in found) == int(images.isfinite().sum())
        for histogram in found:
            assert (np.diff(histogram.values) > 0).all()
            assert not np.signbit(histogram.values[histogram.values == 0]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_histograms_do_not_depend_on_the_device(device: torch.device, dtype: torch.dtype) -> None:
    special = special_values(dtype)
    x = special[torch.randint(len(special), (3, 2, 16, 17))]
    assert histograms_of(x.to(device)) == histograms_of(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_rounded_to_11_bits(dtype: torch.dtype) -> None:
    special = special_values(dtype)
    for value in special[special.isfinite()].tolist():
        (histogram,) = histograms_of(torch.tensor([[value]], dtype=dtype))
        (got,) = histogram.values
        if dtype in DTYPES[:3] or (dtype in DTYPES[3:5] and -(2**15) <= value < 2**16) or dtype.itemsize == 2:
            assert got == value
        else:
            assert abs(got - value) <= max(abs(value) * 2.0**-11, 2.0**-1033)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", EXACT)
def test_quantiles_of_16_bits_are_those_of_numpy(dtype: str, layout: str) -> None:
    images = pixels(dtype)
    stats = ChannelStats(scale=1, quantiles=Q).update(images.transpose(LAYOUTS[layout]), layout)
    assert np.array_equal(stats.quantile().numpy(), quantiles_of(images))
    assert np.array_equal(stats.quantile(0.3).numpy(), quantiles_of(images, 0.3))
    assert stats.quantile().dtype == torch.float64


@pytest.mark.parametrize("scale", [None, 1 / 255, 0.1, 3.0])
def test_quantiles_are_of_the_scaled_values(scale: float | None) -> None:
    images = pixels("uint8")
    stats = ChannelStats(scale, quantiles=Q).update(images, "NCHW")
    assert np.array_equal(stats.quantile().numpy(), quantiles_of(images * (1 / 255 if scale is None else scale)))


@pytest.mark.parametrize("dtype", ROUNDED)
def test_quantiles_of_floats_are_within_the_bound(dtype: str) -> None:
    images = pixels(dtype)
    stats = ChannelStats(quantiles=Q).update(images, "NCHW")
    expected = quantiles_of(images)
    neighbors = [
        np.stack([np.quantile(images[:, c].astype(np.float64), Q, method=m) for c in range(3)], -1)
        for m in ("lower", "higher")
    ]
    bound = np.maximum(*map(np.abs, neighbors)) * 2.0**-11
    assert (np.abs(stats.quantile().numpy() - expected) <= bound * (1 + 1e-12)).all()
    assert torch.equal(stats.quantile(0), stats.min)
    assert torch.equal(stats.quantile(1), stats.max)


def test_floats_that_are_integers_are_exact() -> None:
    images = pixels("uint8").astype(np.float32)
    assert np.array_equal(ChannelStats(quantiles=Q).update(images, "NCHW").quantile().numpy(), quantiles_of(images))


@pytest.mark.parametrize("dtype", [*EXACT, *ROUNDED, "int32", "int64"])
def test_histograms_do_not_depend_on_the_split(dtype: str) -> None:
    images = pixels(dtype)
    whole = ChannelStats(quantiles=(0.5,)).update(images, "NCHW")
    parts = ChannelStats(quantiles=(0.5,))
    for first, last in ((3, 5), (0, 1), (1, 3)):
        parts.update(images[first:last, :, :, ::-1], "NCHW")
    assert parts.histograms == whole.histograms
    assert parts.sums == whole.sums
    assert torch.equal(parts.quantile(Q), whole.quantile(Q))


def test_integers_and_floats_together() -> None:
    integers, floats = pixels("uint8"), pixels("float16")
    stats = ChannelStats(quantiles=Q).update(integers, "NCHW").update(floats, "NCHW")
    both = np.concatenate([integers * (1 / 255), floats.astype(np.float64)])
    assert np.array_equal(stats.quantile().numpy(), quantiles_of(both))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "float32"])
def test_other_figures_are_the_same_with_quantiles(dtype: str) -> None:
    images = pixels(dtype)
    plain, stats = (ChannelStats(quantiles=q).update(images, "NCHW") for q in ((), (0.5,)))
    for figure in ("count", "mean", "std", "min", "max", "m2"):
        assert torch.equal(getattr(plain, figure), getattr(stats, figure))


def test_nonfinite_values_are_left_out() -> None:
    images = pixels("float32")
    kept = images.copy()
    images[:, :, ::2, 0] = [np.nan, np.inf, -np.inf, np.nan] * 5
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        stats = ChannelStats(quantiles=Q).update(images, "NCHW")
    finite = [kept[:, c][np.isfinite(images[:, c])].reshape(1, 1, -1, 1) for c in range(3)]
    for channel, values in enumerate(finite):
        expected = ChannelStats(quantiles=Q).update(values, "NCHW").quantile()[:, 0]
        assert torch.equal(stats.quantile()[:, channel], expected)
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        empty = ChannelStats(quantiles=Q).update(np.full((1, 1, 2, 2), np.nan, np.float32), "NCHW")
    assert empty.quantile().isnan().all()
    assert empty.histograms[0].values.size == 0
    assert ChannelStats.from_dict(json.loads(json.dumps(empty.to_dict()))) == empty


@pytest.mark.parametrize("dtype", ["uint8", "float16", "int64"])
def test_masks_and_nodata(dtype: str) -> None:
    images = pixels("uint8").astype(dtype)
    images[RANDOM.random(images.shape) < 0.2] = 77
    stats = ChannelStats(scale=1, nodata=77, quantiles=Q).update(images, "NCHW")
    masked = ChannelStats(scale=1, quantiles=Q).update(images, "NCHW", mask=images != 77)
    assert stats.histograms == masked.histograms
    for channel in range(3):
        values = images[:, channel]
        assert np.array_equal(stats.quantile()[:, channel], np.quantile(values[values != 77].astype(np.float64), Q))


def test_values_of_any_magnitude() -> None:
    for unit in (1e-300, 1e-30, 1.0, 1e30, 1e300):
        values = np.array([-1.5, -0.5, 0.25, 1.0]) * unit
        stats = ChannelStats(quantiles=(0.5,)).update(values.reshape(1, 4), "HW")
        assert stats.quantile((0.0, 0.5, 1.0))[:, 0].tolist() == pytest.approx(
            [-1.5 * unit, -0.125 * unit, unit], rel=1e-3
        )
    largest = np.finfo(np.float64).max
    stats = ChannelStats(quantiles=(0.5,)).update(np.array([[-largest, largest]]), "HW")
    assert stats.quantile((0.0, 0.5, 1.0))[:, 0].tolist() == [-largest, 0.0, largest]
    tiny = 5e-324
    assert ChannelStats(quantiles=(0.5,)).update(np.array([[tiny, tiny]]), "HW").quantile(0.5).tolist() == [tiny]


def test_one_value() -> None:
    assert ChannelStats(quantiles=Q).update(np.array([[7]], np.uint8), "HW").quantile().unique().tolist() == [7 / 255]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_saved_and_sent_statistics_keep_histograms(dtype: str, tmp_path: Path) -> None:
    stats = ChannelStats(quantiles=(0.01, 0.99)).update(pixels(dtype), "NCHW")
    stats.save(tmp_path / "stats.json")
    for copy in (
        ChannelStats.load(tmp_path / "stats.json"),
        pickle.loads(pickle.dumps(stats)),
        stats.empty().merge(stats),
    ):
        assert copy == stats
        assert torch.equal(copy.quantile(), stats.quantile())
    assert stats != ChannelStats(quantiles=(0.01, 0.98)).update(pixels(dtype), "NCHW")
    assert ChannelStats(quantiles=(0.5,)).update(pixels(dtype, seed=1), "NCHW") != ChannelStats(
        quantiles=(0.5,)
    ).update(pixels(dtype), "NCHW")
    # A list of numbers takes one line.
    assert len((tmp_path / "stats.json").read_text().splitlines()) < 100


@pytest.mark.parametrize("quantiles", [0.5, (1.5,), (-0.1,), "0.5", (None,), (float("nan"),), 3])
def test_bad_quantiles(quantiles: Any) -> None:
    message = f"quantiles must be a sequence of numbers from 0 to 1, got {quantiles!r}"
    for call in (lambda: ChannelStats(quantiles=quantiles), lambda: dataset_stats([], quantiles=quantiles)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()


def test_statistics_without_histograms() -> None:
    stats = ChannelStats().update(pixels("uint8"), "NCHW")
    for call in (lambda: stats.quantile(0.5), lambda: stats.histograms):
        with pytest.raises(ValueError, match="pass quantiles= to ChannelStats"):
            call()
    with pytest.raises(ValueError, match=r"cannot merge quantiles=\(0.5,\) into quantiles=\(\)"):
        stats.merge(ChannelStats(quantiles=(0.5,)).update(pixels("uint8"), "NCHW"))
    with pytest.raises(ValueError, match="from 0 to 1"):
        ChannelStats(quantiles=(0.5,)).update(pixels("uint8"), "NCHW").quantile(2)
    with pytest.raises(ValueError, match="no images yet"):
        ChannelStats(quantiles=(0.5,)).quantile()


def test_the_table_and_the_code_for_the_transform() -> None:
    images = np.arange(101, dtype=np.float32).reshape(1, 1, 101)
    text = str(ChannelStats(quantiles=(0.01, 0.5, 0.99)).update(images, "CHW"))
    assert text.splitlines()[1].split() == ["channel", "count", "mean", "std", "min", "max", "1%", "50%", "99%"]
    assert text.splitlines()[2].split()[6:] == ["1.0000", "50.0000", "99.0000"]
    assert text.splitlines()[-1] == "normfused.transforms.QuantileNormalize(low=[1.0000], high=[99.0000])"
    transform = eval(text.splitlines()[-1])
    assert torch.equal(transform(torch.tensor([[[1.0, 50.0, 99.0, 100.0]]])), torch.tensor([[[0.0, 0.5, 1.0, 1.0]]]))
    constant = ChannelStats(quantiles=(0.25, 0.75)).update(np.zeros((1, 4, 4), np.uint8), "CHW")
    assert str(constant).splitlines()[-1].endswith("  # equal quantiles: channel 0")


# Several processes.


def four_ranks(dtype: str) -> None:
    images = pixels(dtype, (11, 3, 20, 20))
    expected = ChannelStats(quantiles=Q).update(images, "NCHW")
    rank, first = distributed.get_rank(), [0, 1, 1, 7, 11]  # uneven shares, one of them empty
    own = ChannelStats(quantiles=Q)
    if first[rank] < first[rank + 1]:
        own.update(images[first[rank] : first[rank + 1]], "NCHW")
    own.all_reduce()
    assert own.histograms == expected.histograms
    assert own.quantile().numpy().tobytes() == expected.quantile().numpy().tobytes()
    together = dataset_stats(
        images, layout="NCHW", quantiles=Q, process_group=distributed.group.WORLD, weights=[1.0, 2.0, 0.5] * 3 + [0, 4]
    )
    alone = dataset_stats(images, layout="NCHW", quantiles=Q, weights=[1.0, 2.0, 0.5] * 3 + [0, 4])
    assert torch.equal(together.quantile(), alone.quantile())
    assert together.sums == alone.sums


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_four_processes_give_the_same_quantiles(ranks: Ranks, dtype: str) -> None:
    ranks.run(4, four_ranks, dtype)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_sets(workers: int) -> None:
    images = [image for image in pixels("uint8")]
    stats = dataset_stats(images, layout="CHW", quantiles=Q, num_workers=workers, batch_size=2)
    assert stats == ChannelStats(quantiles=Q).update(np.stack(images), "NCHW")
    assert dataset_stats(torch.from_numpy(np.stack(images)), quantiles=Q) == stats


# Weights.


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float64"])
def test_integer_weights_repeat_images(dtype: str) -> None:
    images, times = pixels(dtype), [2, 0, 1, 3, 2]
    repeated = ChannelStats(quantiles=Q).update(np.repeat(images, times, axis=0), "NCHW")
    for weights in (times, np.array(times), torch.tensor(times), torch.tensor(times, dtype=torch.float64)):
        stats = ChannelStats(quantiles=Q).update(images, "NCHW", weights=weights)
        assert stats.images == 4
        assert stats.count.dtype == torch.int64
        assert stats.sums == repeated.sums
        assert stats.histograms == repeated.histograms
        assert torch.equal(stats.quantile(), repeated.quantile())
        for figure in ("count", "mean", "std", "min", "max"):
            rtol = 1e-5 if dtype == "float16" else 1e-12  # of moments in float32
            torch.testing.assert_close(getattr(stats, figure), getattr(repeated, figure), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float64"])
def test_fractional_weights(dtype: str) -> None:
    images, weights = pixels(dtype), [0.3, 0.0, 1e-3, 2.5, 1.0]
    rel = 1e-5 if dtype == "float16" else 1e-9  # of moments in float32
    stats = ChannelStats(scale=1, quantiles=Q).update(images, "NCHW", weights=weights)
    for channel in range(3):
        values = images[:, channel].astype(np.float64)
        of_values = np.broadcast_to(np.reshape(weights, (5, 1, 1)), values.shape)
        mean = np.average(values, weights=of_values)
        assert stats.mean[channel].item() == pytest.approx(mean, rel=rel)
        variance = np.average((values - mean) ** 2, weights=of_values)
        assert stats.var[channel].item() == pytest.approx(variance, rel=rel)
        used = values[np.array(weights) > 0]
        assert (stats.min[channel].item(), stats.max[channel].item()) == (used.min(), used.max())
        assert stats.count[channel].item() == pytest.approx(of_values.sum())
        if dtype in ("uint8", "float16"):
            expected = np.quantile(used, Q, weights=of_values[np.array(weights) > 0], method="inverted_cdf")
            assert np.array_equal(stats.quantile()[:, channel], expected)
    assert "count" in str(stats)
    assert ChannelStats.from_dict(json.loads(json.dumps(stats.to_dict()))) == stats


def test_weights_of_integers_are_exact_in_any_order() -> None:
    images, weights = pixels("uint8"), [0.1, 0.7, 1 / 3, 2.5, 1e-9]
    whole = ChannelStats().update(images, "NCHW", weights=weights)
    parts = ChannelStats()
    for index in (4, 1, 0, 3, 2):
        parts.update(images[index], "CHW", weights=weights[index])
    assert parts == whole
    loaded = ChannelStats.from_dict(json.loads(json.dumps(whole.to_dict())))
    assert loaded == whole
    assert loaded.merge(parts).sums == whole.merge(parts).sums


def test_weights_with_a_mask() -> None:
    images, mask = pixels("uint8"), RANDOM.random((5, 40, 30)) < 0.5
    stats = ChannelStats().update(images, "NCHW", mask=mask, weights=[2, 1, 1, 0, 1])
    order = [0, 0, 1, 2, 4]
    assert stats.sums == ChannelStats().update(images[order], "NCHW", mask=mask[order]).sums


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_of_a_data_set(workers: int) -> None:
    images, weights = pixels("uint8"), [2.0, 0.0, 1.0, 0.5, 3.0]
    expected = ChannelStats().update(images, "NCHW", weights=weights)
    items: list[Any] = [(image, "label") for image in images]
    items[1] = "not read, because its weight is 0"
    assert dataset_stats(items, layout="CHW", weights=weights, num_workers=workers, batch_size=2) == expected
    assert dataset_stats(images, layout="NCHW", weights=torch.tensor(weights), batch_size=2) == expected
    with pytest.raises(ValueError, match="weights must hold a number for each of 5 images, got 4"):
        dataset_stats(images, layout="NCHW", weights=weights[:4])
    with pytest.raises(ValueError, match="weights need data that can be indexed"):
        dataset_stats(iter(images), layout="CHW", weights=weights)
    with pytest.raises(ValueError, match="holds no images"):
        dataset_stats(images, layout="NCHW", weights=[0] * 5)


@pytest.mark.parametrize("weight", [2**-64, 2**40, 2**62, 2.0**64])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float64"])
def test_extreme_weights(dtype: str, weight: float) -> None:
    """One weight for all images changes no figure but the counts, also where these exceed int64."""
    images = pixels(dtype)
    plain = ChannelStats(scale=1, quantiles=Q).update(images, "NCHW")
    stats = ChannelStats(scale=1, quantiles=Q)
    for image in images:
        stats.update(image, "CHW", weights=weight)
    for figure in ("mean", "std", "min", "max"):
        torch.testing.assert_close(getattr(stats, figure), getattr(plain, figure), rtol=1e-9, atol=0)
    torch.testing.assert_close(stats.count.double(), plain.count.double() * weight, rtol=1e-12, atol=0)
    for histogram, expected in zip(stats.histograms, plain.histograms, strict=True):
        assert np.array_equal(histogram.values, expected.values)
        assert np.allclose(histogram.counts / weight, expected.counts, rtol=1e-12)
    neighbors = [np.quantile(np.repeat(h.values, h.counts), Q, method="inverted_cdf") for h in plain.histograms]
    if weight != 2**40:  # with fractional counts, and with those above 2^53, without interpolation
        assert (stats.quantile()[1:-1].numpy() == np.stack(neighbors, axis=-1)[1:-1]).all()
    assert ChannelStats.from_dict(json.loads(json.dumps(stats.to_dict()))) == stats


@pytest.mark.parametrize(
    "weights", [[1e-30] * 5, [1e30] * 5, [1, 2], [-1] * 5, [float("nan")] * 5, [float("inf")] * 5, ["1"] * 5, [[1]] * 5]
)
def test_bad_weights(weights: Any) -> None:
    stats = ChannelStats().update(pixels("uint8"), "NCHW")
    before = stats.to_dict()
    with pytest.raises(ValueError, match="weights must"):
        stats.update(pixels("uint8"), "NCHW", weights=weights)
    assert stats.to_dict() == before


# The command.


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_the_command_prints_the_quantiles_of_numpy(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = pixels(dtype, (7, 1, 28, 28))[:, 0]
    np.save(tmp_path / "images.npy", images)
    arguments = (tmp_path / "images.npy", "--layout", "NHW", "--quantiles", "0.01,0.99", "--json", tmp_path / "s.json")
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    scale = 1 / 255 if dtype == "uint8" else 1.0
    expected = np.quantile(images * scale, (0.01, 0.99)).tolist()
    assert out.splitlines()[1].split()[-2:] == ["1%", "99%"]
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["quantiles"] == {"0.01": expected[:1], "0.99": expected[1:]}
    loaded = ChannelStats.load(tmp_path / "s.json")
    assert loaded.quantile().flatten().tolist() == expected
    assert loaded.quantile(0.5).item() == np.median(images * scale)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("2", "must be from 0 to 1, got 2"), ("0.1,x", "'x' is not a number"), ("", "'' is not a number")],
)
def test_bad_quantiles_of_the_command(text: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run(capsys, "images", "--quantiles", text)
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"normfused stats: error: argument --quantiles: {problem}\n"


# The transform.


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("clip", [True, False])
def test_quantile_normalize(dtype: torch.dtype, clip: bool) -> None:
    image = (torch.rand(2, 3, 8, 9, dtype=torch.float64) * 200).to(dtype)
    scale = 1 / 255 if dtype == torch.uint8 else 1.0
    low, high = torch.tensor([10.0, 20.0, 30.0]) * scale, torch.tensor([150.0, 120.0, 190.0]) * scale
    got = QuantileNormalize(low, high, (-1, 1), clip=clip)(image)
    x = (image.double() * scale - low.view(3, 1, 1)) / (high - low).view(3, 1, 1) * 2 - 1
    expected = x.clamp(-1, 1) if clip else x
    assert got.dtype == (dtype if dtype.is_floating_point else torch.float32)
    torch.testing.assert_close(
        got.double(),
        expected,
        rtol=2e-3 if dtype == torch.float16 else 1e-5,
        atol=2e-3 if dtype == torch.float16 else 1e-5,
    )


def test_quantile_normalize_by_all_quantiles_is_min_max() -> None:
    image = torch.rand(3, 5, 6)
    low, high = ChannelStats(quantiles=(0, 1)).update(image).quantile()
    torch.testing.assert_close(QuantileNormalize(low, high)(image), MinMaxNormalize(per_channel=True)(image))


def test_quantile_normalize_has_gradients_and_takes_samples() -> None:
    image = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]], requires_grad=True)
    QuantileNormalize(0.5, 2.5)(image).sum().backward()
    assert image.grad is not None
    assert image.grad.tolist() == [[[0.0, 0.5, 0.5, 0.0]]]
    result, label = QuantileNormalize(0.0, 2.0)((torch.ones(1, 2, 2), 7))
    assert (result.unique().item(), label) == (0.5, 7)
    assert QuantileNormalize(0.0, 255.0, scale=1)(np.full((2, 2, 3), 255, np.uint8)).unique().item() == 1
    assert repr(QuantileNormalize(0.0, 2.0)) == "QuantileNormalize(low=[0.0], high=[2.0], range=(0.0, 1.0), clip=True)"


def test_quantile_normalize_of_a_constant_channel() -> None:
    with pytest.raises(
        ValueError, match=r"high must be above low, got 2.0 and 2.0 for channel 1; eps= sets a minimum extent"
    ):
        QuantileNormalize([0.0, 2.0], [1.0, 2.0])
    output = QuantileNormalize([0.0, 2.0], [1.0, 2.0], eps=1e-6)(
        torch.stack([torch.ones(1, 2), torch.full((1, 2), 2.0)])
    )
    assert output.flatten().tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0.0), "high must be above low, got 0.0 and 1.0 for channel 0"),
        (([0.0, 1.0], [1.0, 2.0, 3.0]), "low has 2 numbers, but high has 3"),
        ((0.0, float("inf")), "high must be finite"),
        ((0.0, 1.0, (1.0, 0.0)), "range must be two finite numbers in ascending order"),
    ],
)
def test_bad_arguments_of_quantile_normalize(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"QuantileNormalize: {message}"):
        QuantileNormalize(*arguments)


def test_the_public_name() -> None:
    assert "QuantileNormalize" in normfused.transforms.__all__
