"""Per-channel sums and moments compared with float64. Runs on the fallback too."""

from __future__ import annotations

import math

import pytest
import torch
from common import LAYOUTS, assert_same_bits, dtype_id, lay_out
from torch import Tensor

import normfused
from normfused import channel_moments, channel_sums, functional, reference

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
SHAPES = [(7, 3), (1000, 5), (5, 3, 11), (4, 3, 17, 19), (2, 3, 4, 5, 6), (6, 1, 5, 5), (5, 33, 1, 1), (1, 1)]


def rows_of(x: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(x.size(1), -1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x = lay_out((torch.randn(shape) * 3 + 2).to(device, dtype), layout)
    moments = channel_moments(x)
    rows = rows_of(x.double())
    assert type(moments) is normfused.ChannelMoments
    assert moments.count == rows.size(1)
    assert type(moments.count) is int
    for value in moments[1:]:
        assert value.dtype == torch.float64
        assert value.shape == (shape[1],)
    deviations = (rows - rows.mean(1, keepdim=True)).square().sum(1)
    # Values of narrow types may be summed in float32, in segments and relative to a pivot.
    ulps = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert ((moments.mean - rows.mean(1)).abs() <= ulps * rows.abs().mean(1)).all()
    torch.testing.assert_close(moments.m2, deviations, rtol=2 * ulps, atol=1e-12)
    assert torch.equal(moments.min, rows.amin(1))
    assert torch.equal(moments.max, rows.amax(1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x = lay_out((torch.randn(shape) * 3 + 2).to(device, dtype), layout)
    sums = channel_sums(x)
    rows = rows_of(x.double())
    assert type(sums) is normfused.ChannelSums
    assert sums.count == rows.size(1)
    assert sums.sum.dtype == sums.sum_of_squares.dtype == torch.float64
    torch.testing.assert_close(sums.sum, rows.sum(1), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(sums.sum_of_squares, rows.square().sum(1), rtol=1e-12, atol=0)
    assert torch.equal(sums.min, rows.amin(1))
    assert torch.equal(sums.max, rows.amax(1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INTEGERS, ids=dtype_id)
def test_integers_are_exact(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    limits = torch.iinfo(dtype)
    low, high = max(limits.min, -(2**25)), min(limits.max, 2**25)
    x = lay_out(torch.randint(low, high + 1, (6, 3, 40, 5)).to(device, dtype), layout)
    x[0, :, 0, 0] = torch.tensor([low, high, high], device=device, dtype=dtype)
    sums = channel_sums(x)
    rows = [[int(v) for v in row] for row in rows_of(x).tolist()]
    assert sums.count == 1200
    assert sums.sum.dtype == sums.sum_of_squares.dtype == torch.int64
    assert sums.sum.tolist() == [sum(row) for row in rows]
    assert sums.sum_of_squares.tolist() == [sum(v * v for v in row) for row in rows]
    assert sums.min.dtype == sums.max.dtype == torch.int64
    assert sums.min.tolist() == [min(row) for row in rows]
    assert sums.max.tolist() == [max(row) for row in rows]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_id)
def test_integers_up_to_what_int64_holds(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    """Sums of squares up to the limit are exact. Beyond it they are refused, by the reference too; so are sums."""
    largest = math.isqrt((2**63 - 1) // 3)  # of which three squares fit
    largest = min(largest, torch.iinfo(dtype).max)
    values = [largest, -largest, 0, 5, -3, 1]
    x = lay_out(torch.tensor(values).view(1, 1, 2, 3).expand(1, 4, 2, 3).to(device, dtype), layout)
    expected = [sum(v * v for v in values)] * 4
    for function in (channel_sums, reference.channel_sums):
        sums = function(x)
        assert sums.sum.tolist() == [sum(values)] * 4
        assert sums.sum_of_squares.tolist() == expected
    limits = torch.iinfo(dtype)
    beyond = [("sum of squares", [limits.min, limits.max, limits.min + 1, limits.max])] + [("sum", [2**62] * 3)] * (
        dtype == torch.int64
    )
    for what, values in beyond:
        wide = lay_out(torch.tensor(values).view(1, 1, -1, 1).expand(1, 4, -1, 1).to(device, dtype), layout)
        for function in (channel_sums, reference.channel_sums):
            with pytest.raises(ValueError, match=f"channel_sums: the {what} of a channel exceeds int64; normfused.Ch"):
                function(wide)


# The exponents of float32 in steps that reach its largest, its smallest normal and its subnormal numbers; then others.
EXPONENTS = [*range(-136, 127, 12), *range(-1000, 500, 125)]
SIXTEENTHS = [-24.0, -9.0, -8.0, -1.0, 0.0, 3.0, 16.0, 31.0]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_moments_of_any_magnitude(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    """A power of two scales mean and M2 exactly, also where squares underflow or overflow the dtype of the data."""
    x = torch.tensor(SIXTEENTHS, dtype=torch.float64).repeat(40).view(2, 1, 20, 8).repeat(1, 3, 1, 1)
    moments = reference.channel_moments(x)
    smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    done = 0
    for exponent in EXPONENTS:
        scale = 2.0**exponent
        if not (smallest / 2**5 if dtype == torch.float32 else smallest) <= scale <= largest / 32:
            continue
        if dtype == torch.float64 and abs(exponent) > 480:  # the squares are beyond float64
            continue
        ours = channel_moments(lay_out((x * scale).to(device, dtype), layout))
        rtol = 1e-13 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(ours.mean.cpu() / scale, moments.mean, rtol=rtol, atol=0)
        torch.testing.assert_close(ours.m2.cpu() / scale / scale, moments.m2, rtol=rtol, atol=0)
        done += 1
    assert done >= 2


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_moments_of_tiny_values_with_flushed_subnormals(layout: str) -> None:
    x = torch.tensor(SIXTEENTHS).repeat(40).view(2, 1, 20, 8).repeat(1, 3, 1, 1)
    moments = reference.channel_moments(x)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        ours = channel_moments(lay_out(x * 2.0**-66, layout))
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(ours.m2 * 2.0**132, moments.m2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("eps", [0.0, 2.0**-150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_batch_norm_of_tiny_values(device: torch.device, dtype: torch.dtype, eps: float, layout: str) -> None:
    """With an eps that allows it, values whose squares underflow are normalized as larger ones."""
    x = torch.tensor(SIXTEENTHS).repeat(40).view(2, 1, 20, 8).repeat(1, 3, 1, 1).to(device)
    scale = 2.0**-90
    expected = functional.batch_norm(x.to(dtype), None, None, training=True, eps=eps / scale**2)
    y = functional.batch_norm(lay_out((x * scale).to(dtype), layout), None, None, training=True, eps=eps)
    torch.testing.assert_close(y.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_many_bytes(device: torch.device) -> None:
    x = torch.full((1, 2, 3000, 1000), 255, dtype=torch.uint8, device=device)
    sums = channel_sums(x)
    assert sums.sum.tolist() == [3_000_000 * 255] * 2
    assert sums.sum_of_squares.tolist() == [3_000_000 * 255**2] * 2


def test_sums_of_bytes_exceed_32_bits(device: torch.device) -> None:
    x = torch.full((1, 8400, 8400, 3), 255, dtype=torch.uint8, device=device).movedim(-1, 1)
    sums = channel_sums(x)
    assert sums.sum.tolist() == [8400**2 * 255] * 3
    assert sums.sum_of_squares.tolist() == [8400**2 * 255**2] * 3
    assert sums.min.tolist() == sums.max.tolist() == [255] * 3


@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (0, 3, 5, 5), (5, 0), (2, 0, 3)], ids=str)
def test_empty(device: torch.device, shape: tuple[int, ...]) -> None:
    moments = channel_moments(torch.empty(shape, device=device))
    if shape[1]:
        assert moments.count == 0
    assert moments.mean.tolist() == moments.m2.tolist() == [0.0] * shape[1]
    assert moments.min.tolist() == [torch.inf] * shape[1]
    assert moments.max.tolist() == [-torch.inf] * shape[1]
    for dtype in (torch.float32, torch.uint8):
        sums = channel_sums(torch.empty(shape, device=device, dtype=dtype))
        assert sums.count == moments.count
        assert sums.sum.tolist() == sums.sum_of_squares.tolist() == [0] * shape[1]
        limits = torch.iinfo(torch.int64)
        low, high = (-torch.inf, torch.inf) if dtype.is_floating_point else (limits.min, limits.max)
        assert sums.min.tolist() == [high] * shape[1]
        assert sums.max.tolist() == [low] * shape[1]


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("position", [0, 63, 64, -1])
@pytest.mark.parametrize("shape", [(100, 5), (3, 5, 300)], ids=str)
def test_nan_stays_in_its_channel(
    device: torch.device, shape: tuple[int, ...], position: int, layout: str, dtype: torch.dtype
) -> None:
    clean = torch.randn(shape).to(device, dtype)
    dirty = clean.clone()
    (dirty[position, 2:3] if dirty.dim() == 2 else dirty[1, 2, position : position + 1 or None]).fill_(torch.nan)
    ours, untouched = channel_moments(lay_out(dirty, layout)), channel_moments(lay_out(clean, layout))
    sums, clean_sums = channel_sums(lay_out(dirty, layout)), channel_sums(lay_out(clean, layout))
    keep = torch.tensor([0, 1, 3, 4], device=device)
    for value, expected in zip((*ours[1:], *sums[1:]), (*untouched[1:], *clean_sums[1:]), strict=True):
        assert value[2].isnan()
        assert_same_bits(value[keep], expected[keep])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinities_of_both_signs_make_moments_nan_but_not_extremes(device: torch.device, layout: str) -> None:
    x = torch.randn(8, 3, 5, device=device)
    x[2, 1, 3], x[5, 1, 0] = torch.inf, -torch.inf
    moments = channel_moments(lay_out(x, layout))
    assert moments.mean.isnan().tolist() == [False, True, False]
    assert moments.m2.isnan().tolist() == [False, True, False]
    assert torch.equal(moments.min, x.double().amin((0, 2)))
    assert torch.equal(moments.max, x.double().amax((0, 2)))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinity(device: torch.device, value: float) -> None:
    x = torch.randn(100, 3, device=device)
    x[50, 1] = value
    moments, sums = channel_moments(x), channel_sums(x)
    assert moments.mean[1].item() == sums.sum[1].item() == value
    assert moments.m2[1].isnan()
    assert (moments.max if value > 0 else moments.min)[1].item() == value
    assert (moments.min if value > 0 else moments.max)[1].isfinite()
    assert sums.sum_of_squares[1].item() == torch.inf
    assert moments.m2[[0, 2]].isfinite().all()


@pytest.mark.usefixtures("thread_count")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 2, 40_000), (5000, 24)], ids=str)
def test_results_are_bitwise_independent_of_thread_count(shape: tuple[int, ...], layout: str) -> None:
    x = lay_out(torch.randn(shape), layout)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append((*channel_moments(x)[1:], *channel_sums(x)[1:]))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


def test_not_differentiable_and_reference_agrees(device: torch.device) -> None:
    x = torch.randn(5, 3, 4, device=device, requires_grad=True)
    for name in ("channel_moments", "channel_sums"):
        results = getattr(functional, name)(x)
        for value, expected in zip(results, getattr(reference, name)(x.detach()), strict=True):
            torch.testing.assert_close(value, expected)
            assert not getattr(value, "requires_grad", False)


COMPLEX = torch.zeros(2, 3, dtype=torch.complex64)
DIMS = "input needs at least 2 dimensions (N, C, ...), got shape"
FLOATING = "input must be float32, float64, float16 or bfloat16, got"
NUMBERS = "input must be a floating or integer tensor, got"
BAD = [
    (channel_moments, torch.zeros(3), ValueError, f"channel_moments: {DIMS} (3,)"),
    (channel_sums, torch.zeros(()), ValueError, f"channel_sums: {DIMS} ()"),
    (channel_moments, torch.zeros(2, 3).int(), TypeError, f"channel_moments: {FLOATING} torch.int32"),
    (channel_moments, COMPLEX, TypeError, f"channel_moments: {FLOATING} torch.complex64"),
    (channel_sums, torch.zeros(2, 3).bool(), TypeError, f"channel_sums: {NUMBERS} torch.bool"),
    (channel_sums, COMPLEX, TypeError, f"channel_sums: {NUMBERS} torch.complex64"),
]


@pytest.mark.parametrize(("function", "x", "kind", "message"), BAD, ids=[case[3][:60] for case in BAD])
def test_bad_input(function, x: Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        function(x)
    assert str(error.value) == message
