"""Statistics of channels and images, and normalization by constants: results of exact data, with tolerance 0."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from common import dtype_id, lay_out, sample_id
from exact_data import assert_exact, nearest, on_cuda, statistics, tensor_of, to_tensor
from torch import Tensor

import normfused

pytestmark = pytest.mark.usefixtures("needs_extension")

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32]
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "offset"])


def images_of(shape: tuple[int, int, int], dtype: torch.dtype, shuffled: bool, variance: int = 2) -> Tensor:
    """Channels of mean 5 + c % 4 for channel c."""
    samples, channels, length = shape
    d = statistics(channels, [samples * length], shuffled, variance).d
    x = tensor_of(lambda c, d: Fraction(5 + c % 4 + d), dtype, np.arange(channels)[:, None], d)
    return x.view(channels, samples, length).transpose(0, 1).contiguous()


# On both sides of the size at which channels of float32 are divided into splits.
SHAPES = [(16, 4, 16), (9, 3, 5), (4, 70, 30), (1, 2, 32_766), (1, 3, 32_783), (1, 128, 259)]


@pytest.mark.parametrize("shape", SHAPES, ids=sample_id)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@layouts
def test_channel_moments(layout: str, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> None:
    if on_cuda(device) and shape != SHAPES[0]:
        pytest.skip("exact on CUDA only for powers of two: see exact_data.py")
    x = images_of(shape, dtype, False)
    moments = normfused.channel_moments(lay_out(x.to(device), layout))
    count, means = shape[0] * shape[2], [5 + c % 4 for c in range(shape[1])]
    assert moments.count == count
    assert_exact(
        mean=(moments.mean, to_tensor(means, torch.float64)),
        m2=(moments.m2, to_tensor([2 * count] * shape[1], torch.float64)),
        min=(moments.min, x.double().transpose(0, 1).flatten(1).min(1).values),
        max=(moments.max, x.double().transpose(0, 1).flatten(1).max(1).values),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=sample_id)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@layouts
def test_channel_sums(layout: str, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> None:
    x = images_of(shape, dtype, True)
    sums = normfused.channel_sums(lay_out(x.to(device), layout))
    count, means = shape[0] * shape[2], [5 + c % 4 for c in range(shape[1])]
    assert sums.count == count
    assert_exact(
        sum=(sums.sum, to_tensor([mean * count for mean in means], torch.float64)),
        sum_of_squares=(sums.sum_of_squares, to_tensor([(mean**2 + 2) * count for mean in means], torch.float64)),
    )


@pytest.mark.parametrize("shape", [(5, 3, 7), (9, 5, 26), (1, 3, 131_073), (3, 70, 333)], ids=sample_id)
@pytest.mark.parametrize("dtype", INTEGERS, ids=dtype_id)
@layouts
def test_integer_sums(layout: str, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> None:
    """Of random values: integers are summed in integers."""
    limits = torch.iinfo(dtype)
    bound = min(limits.max, 1 << 20)  # the sums of squares fit int64
    x = torch.randint(max(limits.min, -bound), bound + 1, shape).to(dtype)
    sums = normfused.channel_sums(lay_out(x.to(device), layout))
    channels = x.transpose(0, 1).flatten(1).tolist()
    for got, figure in (
        (sums.sum, sum),
        (sums.sum_of_squares, lambda values: sum(value * value for value in values)),
        (sums.min, min),
        (sums.max, max),
    ):
        assert got.dtype == torch.int64
        assert got.tolist() == [figure(values) for values in channels]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.float64], ids=dtype_id)
def test_channel_stats(dtype: torch.dtype) -> None:
    """In one update, in several, and of a data set."""
    x = images_of((12, 3, 45), torch.float64, False, 4).to(dtype).view(12, 3, 5, 9)
    scale = 0.25
    whole = normfused.ChannelStats(scale=scale).update(x)
    parts = normfused.ChannelStats(scale=scale)
    for part in x.split([2, 4, 6]) if not dtype.is_floating_point else [x]:
        parts.update(part)
    for stats in (whole, parts, normfused.dataset_stats(x, scale=scale, batch_size=12)):
        assert stats.count.tolist() == [540] * 3
        assert_exact(
            mean=(stats.mean, to_tensor([Fraction(5 + c, 4) for c in range(3)], torch.float64)),
            var=(stats.var, to_tensor([Fraction(4, 16)] * 3, torch.float64)),
            std=(stats.std, to_tensor([Fraction(1, 2)] * 3, torch.float64)),
        )


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 64, 65), (3, 33, 9, 4)], ids=sample_id)
@pytest.mark.parametrize("output", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=dtype_id)
@layouts
def test_normalize(
    layout: str, dtype: torch.dtype, output: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """(x * scale - mean) / std with constants for which the quotient has at most eight bits."""
    x = torch.randint(0, 256, shape)
    mean, std, scale = [32 * (1 + c % 4) for c in range(shape[1])], [2.0 ** (c % 5 - 2) for c in range(shape[1])], 0.5
    expected = tensor_of(
        lambda c, value: nearest((Fraction(value) / 2 - mean[c]) / Fraction(std[c]), output),
        output,
        np.arange(shape[1]).reshape(-1, 1, 1),
        x.numpy(),
    )
    values = lay_out(x.to(device, dtype), layout)
    got = normfused.normalize(values, mean, std, scale=scale, dtype=output)
    assert_exact(output=(got, expected))
    last = normfused.normalize(values, mean, std, scale=scale, dtype=output, memory_format=torch.channels_last)
    assert_exact(output=(last, expected))


def test_standardize(device: torch.device) -> None:
    """By the images' own statistics, with a standard deviation of 2."""
    x = images_of((1, 3, 256), torch.float32, False, 4).view(3, 16, 16)
    expected = (x - torch.tensor([5.0, 6.0, 7.0]).view(3, 1, 1)) / 2
    assert_exact(output=(normfused.transforms.Standardize()(x.to(device)), expected))
