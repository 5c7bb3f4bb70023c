"""functional.normalize compared with its formula in float64. Runs on the fallback too."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from common import assert_same_bits, dtype_id, lay_out
from torch import Tensor

import normfused
from normfused import functional
from normfused.functional import normalize, normalize_

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Pairs that have a kernel, and pairs that are converted via another dtype.
PAIRS = [*itertools.product([torch.uint8, *FLOATS], FLOATS)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def image(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype).to(device)
    return torch.randn(shape).to(device, dtype)


def constants(channels: int) -> tuple[list[float], list[float]]:
    return [0.4 + 0.1 * c for c in range(channels)], [0.2 + 0.05 * c for c in range(channels)]


def exact(x: Tensor, mean: list[float], std: list[float], scale: float) -> Tensor:
    m, s = (torch.tensor(v, dtype=torch.float64, device=x.device).view(-1, 1, 1) for v in (mean, std))
    return (x.double() * scale - m) / s


def half_ulps(x: Tensor) -> float:
    """The error bound for results of bytes, in half ulps. With fused multiply-add the rounding is almost correct."""
    return 1.001 if x.is_cuda or normfused.info()["cpu_capability"] in ("avx512", "avx2", None) else 2.0


def assert_close(got: Tensor, x: Tensor, mean: list[float], std: list[float], scale: float) -> None:
    """Results of bytes are rounded as if once. With floating input, constants and deviations are rounded too."""
    want = exact(x, mean, std, scale)
    rounding = torch.finfo(got.dtype).eps / 2 * (want.abs() + torch.finfo(got.dtype).smallest_normal)
    magnitude = exact(x.abs(), [-abs(m) for m in mean], std, scale)
    error = (got.double() - want).abs()
    if x.dtype == torch.uint8 and got.dtype != torch.float64:
        assert (error <= half_ulps(x) * rounding + 1e-14 * magnitude).all(), (error / rounding).max()
    else:
        arithmetic = torch.promote_types(x.dtype, torch.float32) if x.dtype != torch.uint8 else torch.float64
        assert (error <= rounding + 4 * torch.finfo(arithmetic).eps * magnitude).all(), error.max()


@pytest.mark.parametrize(("input_format", "output_format"), [*itertools.product(FORMATS, FORMATS)], ids=str)
@pytest.mark.parametrize(("dtype", "output_dtype"), PAIRS, ids=dtype_id)
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 4, 64, 65), (3, 5, 8, 8), (2, 70, 5, 13)], ids=str)
def test_every_layout_and_dtype(
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    output_dtype: torch.dtype,
    input_format: torch.memory_format,
    output_format: torch.memory_format,
) -> None:
    x = image(shape, dtype, device).contiguous(memory_format=input_format)
    before = x.clone()
    mean, std = constants(shape[1])
    y = normalize(x, mean, std, dtype=output_dtype, memory_format=output_format)
    assert y.dtype == output_dtype
    assert y.is_contiguous(memory_format=output_format)
    assert_close(y, x, mean, std, 1 / 255 if dtype == torch.uint8 else 1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", ["permuted", "sliced", "expanded", "offset"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=dtype_id)
def test_other_strides(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    x = lay_out(image((4, 3, 10, 11), dtype, device), layout)
    y = normalize(x, *IMAGENET)
    assert_close(y, x, *map(list, IMAGENET), 1 / 255 if dtype == torch.uint8 else 1)


def test_all_bytes_in_an_image_of_height_width_channels(device: torch.device) -> None:
    """The result is that of float64, rounded once, and close to that of the usual three steps."""
    hwc = torch.arange(256, dtype=torch.uint8, device=device).view(16, 16, 1).repeat(1, 1, 3)
    y = normalize(hwc.permute(2, 0, 1), *IMAGENET, memory_format=torch.contiguous_format)
    assert y.is_contiguous()
    if half_ulps(hwc) < 2:
        assert_same_bits(y, exact(hwc.permute(2, 0, 1), *map(list, IMAGENET), 1 / 255).float())
    three_steps = (hwc.permute(2, 0, 1).float() / 255 - torch.tensor(IMAGENET[0], device=device).view(3, 1, 1)) / (
        torch.tensor(IMAGENET[1], device=device).view(3, 1, 1)
    )
    torch.testing.assert_close(y, three_steps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(3, 6, 5), (2, 3, 6, 5), (2, 4, 3, 6, 5), (1, 1, 6, 5), (0, 3, 6, 5), (2, 3, 0, 5)], ids=str
)
def test_shapes(device: torch.device, shape: tuple[int, ...]) -> None:
    x = image(shape, torch.uint8, device)
    mean, std = constants(shape[-3])
    y = normalize(x, mean, std)
    assert y.shape == x.shape
    assert_close(y, x, mean, std, 1 / 255)
    z = image(shape, torch.float32, device)
    want = normalize(z, mean, std)
    assert normalize_(z, mean, std) is z
    assert_same_bits(z, want)


def test_mean_and_std_as_numbers_sequences_arrays_and_tensors(device: torch.device) -> None:
    x = image((3, 4, 5), torch.uint8, device)
    want = normalize(x, [0.5, 0.25, 0.125], [0.5, 0.5, 0.5])
    for mean in ((0.5, 0.25, 0.125), np.array([0.5, 0.25, 0.125]), torch.tensor([0.5, 0.25, 0.125], device=device)):
        for std in (0.5, [0.5], torch.tensor(0.5), np.float64(0.5)):
            assert_same_bits(normalize(x, mean, std), want)
    assert_same_bits(normalize(x, 127.5, 127.5, scale=1.0), normalize(x, 0.5, 0.5))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(("dtype", "output_dtype"), PAIRS, ids=dtype_id)
def test_out(device: torch.device, dtype: torch.dtype, output_dtype: torch.dtype, layout: str) -> None:
    x = image((2, 3, 8, 9), dtype, device)
    out = lay_out(torch.zeros(2, 3, 8, 9, dtype=output_dtype, device=device), layout)
    strides, version = out.stride(), out._version
    assert normalize(x, *IMAGENET, out=out) is out
    assert (out.stride(), out._version > version) == (strides, True)
    assert torch.equal(out, normalize(x, *IMAGENET, dtype=output_dtype))
    batch = torch.zeros(4, 3, 8, 9, dtype=output_dtype, device=device)
    normalize(x[1], *IMAGENET, out=batch[2])
    assert torch.equal(batch[2], out[1])
    assert batch[[0, 1, 3]].abs().max() == 0
    clip = torch.zeros(1, 2, 3, 8, 9, dtype=output_dtype, device=device)
    assert torch.equal(normalize(x[None], *IMAGENET, out=clip), out[None])


def test_out_is_refused(device: torch.device) -> None:
    x = torch.randn(3, 8, 8, device=device)
    cases = [
        ({"out": x.new_empty(3, 8, 7)}, ValueError, "normalize: out must have input's shape (3, 8, 8) and be on"),
        ({"out": x.new_empty(3, 8, 8).byte()}, TypeError, "normalize: out: input must be one of float32, float64,"),
        ({"out": x.clone(), "dtype": torch.half}, ValueError, "normalize: out excludes dtype and memory_format"),
        ({"out": x.clone().requires_grad_()}, RuntimeError, "normalize: out excludes tensors that require grad"),
        ({"out": x[:, :, :1].expand(3, 8, 8)}, RuntimeError, "unsupported operation"),
        ({"out": x}, RuntimeError, "unsupported operation"),
    ]
    for options, error, text in cases:
        before = x.clone()
        with pytest.raises(error) as raised:
            normalize(x, 0.5, 0.5, **options)
        assert str(raised.value).startswith(text)
        assert torch.equal(x, before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced", "offset"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_in_place(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    x = lay_out(image((2, 3, 9, 7), dtype, device), layout)
    want, version, address = normalize(x, *IMAGENET), x._version, x.data_ptr()
    y = normalize_(x, *IMAGENET)
    assert y is x
    assert (x.data_ptr(), x._version > version) == (address, True)
    assert_same_bits(x, want)


def test_in_place_of_a_view_with_more_dimensions(device: torch.device) -> None:
    base = image((3, 2, 3, 4, 5), torch.float32, device)
    want = normalize(base.transpose(0, 1), *IMAGENET)
    assert torch.equal(normalize_(base.transpose(0, 1), *IMAGENET), want)
    assert torch.equal(base.transpose(0, 1), want)


def test_in_place_is_refused(device: torch.device) -> None:
    leaf = torch.randn(3, 4, 4, device=device, requires_grad=True)
    cases = [
        (leaf, RuntimeError, "normalize_ cannot write over input, a leaf that requires grad"),
        (leaf[:], RuntimeError, "normalize_ cannot write over input, a view of a leaf that requires grad"),
        (
            torch.randn(3, 4, 1, device=device).expand(3, 4, 4),
            RuntimeError,
            "normalize_ cannot write over input, whose elements share memory",
        ),
        (
            image((3, 4, 4), torch.uint8, device),
            TypeError,
            "normalize_: input must be one of float32, float64, float16, bfloat16, got torch.uint8",
        ),
    ]
    for x, error, text in cases:
        before = x.detach().clone()
        with pytest.raises(error) as raised:
            normalize_(x, 0.5, 0.5)
        assert str(raised.value).startswith(text)
        assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_gradient(device: torch.device, dtype: torch.dtype) -> None:
    x = image((2, 3, 4, 5), dtype, device).requires_grad_()
    y = normalize(x, *IMAGENET)
    g = torch.randn(y.shape, device=device).to(dtype)
    (grad,) = torch.autograd.grad(y, x, g)
    assert grad.dtype == dtype
    want = g.double() / torch.tensor(IMAGENET[1], dtype=torch.float64, device=device).view(3, 1, 1)
    torch.testing.assert_close(grad.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_gradient_in_place_and_twice(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 4, device=device, dtype=torch.float64, requires_grad=True)

    def in_place(x: Tensor) -> Tensor:
        return normalize_(x * 1.0, *IMAGENET, scale=0.5).square()

    def view_in_place(x: Tensor) -> Tensor:
        y = x * 1.0
        normalize_(y[0], *IMAGENET)
        return y.square()

    for function in (in_place, view_in_place, lambda x: normalize(x, *IMAGENET, dtype=torch.float64).square()):
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(function, (x,))


def test_under_func_transforms(device: torch.device) -> None:
    x = torch.randn(4, 3, 5, 5, device=device)
    torch.testing.assert_close(torch.func.vmap(lambda i: normalize(i, *IMAGENET))(x), normalize(x, *IMAGENET))
    (grad,) = torch.func.vjp(lambda i: normalize(i, *IMAGENET), x)[1](torch.ones_like(x))
    torch.testing.assert_close(grad[0, :, 0, 0].cpu(), 1 / torch.tensor(IMAGENET[1]))


def test_compiled_is_eager(needs_extension: None, device: torch.device) -> None:
    x = image((2, 3, 8, 9), torch.uint8, device)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return normalize(x, *IMAGENET, memory_format=torch.channels_last), normalize_(y + 0, 0.5, 2.0)

    y = torch.randn(2, 3, 8, 9, device=device)
    got = compiled(x, y)
    assert_same_bits(got[0], normalize(x, *IMAGENET, memory_format=torch.channels_last))
    assert_same_bits(got[1], normalize(y, 0.5, 2.0))
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_opcheck(needs_extension: None, device: torch.device) -> None:
    ops = torch.ops.normfused
    x = image((2, 3, 4, 5), torch.uint8, device)
    torch.library.opcheck(
        ops.standardize.default, (x, [0.5] * 3, [0.5] * 3, 1 / 255, torch.float16, torch.channels_last)
    )
    for layout in ("contiguous", "channels_last", "sliced"):
        ys = lay_out(torch.randn(2, 3, 4, 5, device=device), layout)
        outs = lay_out(torch.zeros(2, 3, 4, 5, dtype=torch.half, device=device), layout)
        for input, y, out in ((x, ys, outs), (x[0], ys[0], outs[0])):  # a batch, one image
            torch.library.opcheck(ops.standardize.default, (y.requires_grad_(), [0.5] * 3, [0.5] * 3))
            torch.library.opcheck(ops.standardize_out.default, (input, [0.5] * 3, [0.5] * 3, 2.0, out))
            torch.library.opcheck(ops.standardize_.default, (y.detach().clone(), [0.5] * 3, [0.5] * 3, 2.0))


def test_constant_channel_becomes_zero(device: torch.device) -> None:
    for x in (torch.full((3, 5, 5), 77, dtype=torch.uint8, device=device), torch.full((3, 5, 5), 0.1, device=device)):
        scale = 1 / 255 if x.dtype == torch.uint8 else 1.0
        y = normalize(x, x.double().mean().item() * scale, 0.0, eps=1e-6)
        assert y.abs().max() < 1e-6


ERRORS = {
    "too many": (
        ((1, 28, 28), *IMAGENET),
        {},
        ValueError,
        "3 means for an input with 1 channel (dim -3 of shape (1, 28, 28))",
    ),
    "too few": (
        ((3, 8, 8), (0.5, 0.5), 0.5),
        {},
        ValueError,
        "2 means for an input with 3 channels (dim -3 of shape (3, 8, 8))",
    ),
    "std": (
        ((3, 8, 8), 0.5, (0.5, 0.5)),
        {},
        ValueError,
        "2 stds for an input with 3 channels (dim -3 of shape (3, 8, 8))",
    ),
    "numbers differ": (((3, 8, 8), (0.5, 0.5, 0.5), (0.5, 0.5)), {}, ValueError, "mean has 3 numbers, but std has 2"),
    "zero": (
        ((3, 8, 8), 0.5, (1, 0, 1)),
        {},
        ValueError,
        "std must be above 0, got 0.0 for channel 1; eps= maps a constant channel to 0",
    ),
    "negative": (
        ((3, 8, 8), 0.5, (1, 1, -2)),
        {"eps": 1e-3},
        ValueError,
        "std must be above 0, got -2.0 for channel 2",
    ),
    "nan": (((3, 8, 8), 0.5, (1, torch.nan, 1)), {}, ValueError, "std must be finite, got nan for channel 1"),
    "mean inf": (((3, 8, 8), torch.inf, 1), {}, ValueError, "mean must be finite, got inf for channel 0"),
    "matrix": (((3, 8, 8), [[0.5]], 1), {}, TypeError, "mean must be a number or a sequence of numbers, got [[0.5]]"),
    "text": (((3, 8, 8), "grey", 1), {}, TypeError, "mean must be a number or a sequence of numbers, got 'grey'"),
    "dims": (((8, 8), 0.5, 1), {}, ValueError, "input needs at least 3 dimensions (..., C, H, W), got shape (8, 8)"),
    "eps": (((3, 8, 8), 0.5, 1), {"eps": -1}, ValueError, "eps must be a non-negative finite number, got -1"),
    "scale": (((3, 8, 8), 0.5, 1), {"scale": 0}, ValueError, "scale must be a finite number other than 0, got 0"),
    "dtype": (
        ((3, 8, 8), 0.5, 1),
        {"dtype": torch.int32},
        TypeError,
        "dtype must be float32, float64, float16 or bfloat16, got torch.int32",
    ),
    "format": (
        ((3, 8, 8), 0.5, 1),
        {"memory_format": torch.channels_last_3d},
        ValueError,
        "memory_format must be torch.contiguous_format, torch.channels_last or torch.preserve_format, "
        "got torch.channels_last_3d",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    (shape, mean, std), options, error, text = ERRORS[case]
    with pytest.raises(error) as raised:
        normalize(torch.zeros(shape, dtype=torch.uint8), mean, std, **options)
    assert str(raised.value) == f"normalize: {text}"


def test_input_must_be_a_tensor_of_numbers() -> None:
    with pytest.raises(TypeError, match=r"normalize: input must be a tensor, got ndarray"):
        normalize(np.zeros((3, 4, 4)), 0.5, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got torch.bool"):
        normalize(torch.zeros(3, 4, 4, dtype=torch.bool), 0.5, 1)


def test_names() -> None:
    assert normfused.normalize is functional.normalize
    assert normfused.normalize_ is functional.normalize_
