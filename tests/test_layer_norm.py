"""Results and gradients of layer norm and RMS norm, over the last dimensions and over channels, compared with torch in
float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import DTYPES, LAYOUTS, assert_same_bits, dtype_id, lay_out, sample_id
from layer_norm_calls import EPS, assert_close, by_torch, ours, values_of
from torch import Tensor
from torch.nn import functional as F

import normfused
from normfused.functional import layer_norm, layer_norm2d, rms_norm, rms_norm2d

TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Shapes and numbers of normalized dimensions: rows shorter than a vector, with a tail, of several chunks and groups of
# rows, with parts in backward, with parts in forward.
ROWS = [
    ((3, 4, 7), 1),
    ((3, 4, 7), 2),
    ((3, 4, 7), 3),
    ((130, 33), 1),
    ((2, 150, 768), 1),
    ((5, 1031), 1),
    ((3, 5000), 1),
    ((2, 3, 100, 150), 3),
    ((2, 150_000), 1),
    ((11,), 1),
]
# One block of columns and several, more channels than are added in float, several chunks.
IMAGES = [(2, 3, 2, 2), (3, 96, 7, 7), (2, 70, 40, 30), (1, 200, 33), (40, 12, 9, 10), (2, 6, 3, 4, 5), (1, 1500, 3, 3)]


def check_call(
    x: Tensor, dims: int | None, rms: bool, parameter_dtype: torch.dtype, options: str = "", scale_offset: float = 0.0
) -> None:
    """Outputs and gradients. `options`: which of residual, scale and shift are given, weight and bias are absent."""
    shape = tuple(x.shape)
    normalized = shape[1:2] if dims is None else shape[-dims:]
    shapes = {"input": shape, "weight": normalized, "bias": normalized, "residual": shape}
    shapes |= {name: (shape[0], *normalized) for name in ("scale", "shift")}
    absent = {name for name in ("weight", "bias") if name in options} | ({"bias"} if rms else set())
    absent |= {name for name in ("residual", "scale", "shift") if name not in options}
    tensors: dict[str, Tensor] = {}
    for seed, (name, size) in enumerate(shapes.items()):
        if name in absent:
            continue
        dtype = x.dtype if name in ("input", "residual") else parameter_dtype
        value = x if name == "input" else values_of(size, seed).to(x.device, dtype)
        tensors[name] = value.detach().requires_grad_()
    wide = {k: t.detach().double().requires_grad_() for k, t in tensors.items()}
    if "residual" in tensors:  # the sum is rounded to the dtype
        rounded = (tensors["input"] + tensors["residual"]).detach().double() - wide["residual"].detach()
        wide["input"] = rounded.requires_grad_()
    result, (z, total) = (
        ours(tensors["input"], dims, rms, tensors, scale_offset),
        by_torch(wide["input"], dims, rms, wide, scale_offset),
    )
    y, own_total = result if "residual" in tensors else (result, None)
    grad, grad_total = (values_of(shape, seed).to(x.device, x.dtype) for seed in (9, 10))
    outputs, expected = [y], [z]
    if own_total is not None:
        assert torch.equal(own_total, (tensors["input"] + tensors["residual"]).detach())
        outputs, expected = [y, own_total], [z, total]
    grads = [grad, grad_total][: len(outputs)]
    found = torch.autograd.grad(outputs, list(tensors.values()), grads)
    wanted = torch.autograd.grad(expected, list(wide.values()), [g.double() for g in grads])
    tolerance = TOLERANCE[x.dtype]
    strides = torch.empty_like(normfused.layout.as_dense(x)).stride() if dims is None else torch.empty(shape).stride()
    assert (y.dtype, y.stride()) == (x.dtype, strides)
    assert_close(y, z, tolerance, "output")
    for name, a, b in zip(tensors, found, wanted, strict=True):
        assert a.dtype == tensors[name].dtype
        assert_close(a, b, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("shape", "dims"), ROWS, ids=sample_id)
def test_every_shape_of_rows(
    device: torch.device, shape: tuple[int, ...], dims: int, dtypes: tuple[torch.dtype, torch.dtype], rms: bool
) -> None:
    x = (values_of(shape) * 2 + 1).to(device, dtypes[0])
    check_call(x, dims, rms, dtypes[1])
    check_call(x, dims, rms, dtypes[1], "residual")
    if len(shape) > dims:
        check_call(x, dims, rms, dtypes[1], "scale")
        check_call(x, dims, rms, dtypes[1], "shift")


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", IMAGES, ids=sample_id)
def test_every_shape_of_images(
    device: torch.device, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], layout: str, rms: bool
) -> None:
    x = lay_out((values_of(shape) * 2 + 1).to(device, dtypes[0]), layout)
    check_call(x, None, rms, dtypes[1])
    check_call(x, None, rms, dtypes[1], "residual scale shift")
    check_call(x, None, rms, dtypes[1], "scale")
    check_call(x, None, rms, dtypes[1], "shift")


@pytest.mark.parametrize("dims", [None, 1, 2])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", ["", "residual", "scale shift", "scale weight", "shift weight bias", "weight", "bias residual scale"]
)
def test_every_option(device: torch.device, layout: str, options: str, rms: bool, dims: int | None) -> None:
    x = lay_out(values_of((3, 8, 5, 6)).to(device) + 0.5, layout)
    check_call(x, dims, rms, torch.float64, options)
    check_call(x.to(torch.bfloat16), dims, rms, torch.float32, options, scale_offset=1.0)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((5, 12), 1),
        ((3, 70), 1),
        ((7, 768), 1),
        ((1, 20_000), 1),
        pytest.param((1, 150_000), 1, marks=pytest.mark.exhaustive),
        ((6, 5, 7), None),
        pytest.param((70, 40, 30), None, marks=pytest.mark.exhaustive),
    ],
    ids=sample_id,
)
def test_a_sample_does_not_depend_on_the_batch(
    shape: tuple[int, ...],
    dims: int | None,
    rms: bool,
    dtype: torch.dtype,
    needs_extension: None,
    thread_count: None,
) -> None:
    """Output and gradient are the same to the last bit in 50 batch sizes, at any place, with any number of threads."""
    large = torch.Size(shape).numel() > 10_000
    sizes = range(1, 51) if large else [*range(1, 45), 64, 100, 128, 200, 256, 300]
    samples = values_of((max(sizes), *shape)).to(dtype)
    grads = values_of(samples.shape, 1).to(dtype)
    normalized = shape[:1] if dims is None else shape[-dims:]
    tensors = {"weight": values_of(normalized, 2).to(dtype), "bias": values_of(normalized, 3).to(dtype)}

    def run(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = ours(x, dims, rms, tensors)
        return y.detach(), torch.autograd.grad(y, x, grad)[0]

    torch.set_num_threads(1)
    expected = [run(samples[i : i + 1], grads[i : i + 1]) for i in range(4)]
    for number, size in enumerate(sizes):
        torch.set_num_threads(1 + number % 4)
        order = torch.roll(torch.arange(size), number % (size if size < 4 else size - 3))
        y, grad = run(samples[order], grads[order])
        for i in range(size):
            if order[i] < 4:
                assert_same_bits(y[i : i + 1], expected[order[i]][0])
                assert_same_bits(grad[i : i + 1], expected[order[i]][1])


def test_gradients_of_parameters_do_not_depend_on_threads(needs_extension: None, thread_count: None) -> None:
    for shape, dims in (((700, 48), 1), ((3, 40_000), 1), ((9, 20, 31), None)):
        x, normalized = values_of(shape).float(), (shape[1:2] if dims is None else shape[-dims:])
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            weight, bias = (torch.ones(normalized, requires_grad=True) for _ in range(2))
            y = ours(x, dims, False, {"weight": weight, "bias": bias})
            results.append(torch.cat([g.flatten() for g in torch.autograd.grad(y, (weight, bias), x)]))
        for other in results[1:]:
            assert_same_bits(other, results[0])


@pytest.mark.parametrize("residual_dtype", [torch.float64, torch.float32, torch.float16], ids=dtype_id)
def test_a_residual_of_another_dtype_is_promoted(device: torch.device, residual_dtype: torch.dtype) -> None:
    x, residual = values_of((2, 4, 6)).to(device, torch.float32), values_of((2, 4, 6), 1).to(device, residual_dtype)
    total = x + residual
    y, own_total = layer_norm(x, (6,), residual=residual)
    assert own_total.dtype == total.dtype == y.dtype
    torch.testing.assert_close((y, own_total), (F.layer_norm(total, (6,)), total))


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_rms_norm_takes_weights_of_any_dtype(
    device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x, weight = values_of((3, 6)).to(device, dtype), values_of((6,), 1).to(device, weight_dtype).requires_grad_()
    y, z = rms_norm(x, (6,), weight, EPS), F.rms_norm(x, (6,), weight, EPS)
    assert y.dtype == z.dtype
    tolerance = TOLERANCE[max(dtype, weight_dtype, key=lambda d: torch.finfo(d).eps)]
    assert_close(y, z, tolerance, "output")
    ours_, theirs = (torch.autograd.grad(out.sum(), weight)[0] for out in (y, z))
    assert ours_.dtype == theirs.dtype
    assert_close(ours_, theirs, tolerance, "gradient")


def test_only_the_sum_is_used(device: torch.device) -> None:
    x, residual = (values_of((3, 5), seed).to(device).requires_grad_() for seed in (0, 1))
    weight = torch.ones(5, device=device, dtype=torch.float64, requires_grad=True)
    _, total = layer_norm(x, (5,), weight, residual=residual)
    grads = torch.autograd.grad(total.square().sum(), (x, residual, weight), allow_unused=True)
    torch.testing.assert_close(grads[:2], (2 * total.detach(), 2 * total.detach()))
    assert grads[2] is None or not grads[2].any()


# ---- numerics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=dtype_id)
def test_constant_rows_give_exactly_the_bias(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    for value in (0.1, 300.0, 1e-6, -7.3, 6e4):
        x = lay_out(torch.full((2, 70, 3, 5), value, device=device, dtype=dtype), layout)
        bias = values_of((70,)).to(device, dtype)
        assert torch.equal(layer_norm2d(x, None, bias), bias.view(1, -1, 1, 1).expand_as(x))
        rows = x.flatten(1)
        bias = values_of((rows.size(1),)).to(device, dtype)
        assert torch.equal(layer_norm(rows, bias.shape, None, bias), bias.expand_as(rows))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1e10, 1e19, 1e30, 1e38])
def test_every_magnitude_of_float32(device: torch.device, magnitude: float, layout: str) -> None:
    x = lay_out((values_of((2, 67, 9)).clamp(-3, 3) * magnitude).to(device, torch.float32), layout)
    for dims in (None, 1, 2):
        for rms in (False, True):
            moved = x.double().movedim(1, -1) if dims is None else x.double()
            dim = tuple(range(-(dims or 1), 0))
            centred = moved if rms else moved - moved.mean(dim, keepdim=True)
            expected = centred / (centred.square().mean(dim, keepdim=True) + 1e-90).sqrt()
            function: Any = {
                (True, False): lambda x: layer_norm2d(x, eps=1e-90),
                (True, True): lambda x: rms_norm2d(x, eps=1e-90),
                (False, False): lambda x, n=dims: layer_norm(x, x.shape[-n:], eps=1e-90),
                (False, True): lambda x, n=dims: rms_norm(x, x.shape[-n:], eps=1e-90),
            }[dims is None, rms]
            y = function(x)
            assert_close(y.movedim(1, -1) if dims is None else y, expected, 1e-5, f"dims {dims} rms {rms}")


@pytest.mark.parametrize("shape", [(4, 50), (4, 768), (2, 5000), (1, 200_000)], ids=str)
def test_a_mean_much_larger_than_the_deviation(device: torch.device, shape: tuple[int, ...]) -> None:
    x = (values_of(shape) + 3000).to(device, torch.float32)
    x[:, 0] = -30_000  # the first value is no good pivot
    assert_close(layer_norm(x, shape[1:]), F.layer_norm(x.double(), shape[1:]), 2e-6, "output")
    image = x.view(*shape, 1).expand(*shape, 3).contiguous()
    assert_close(layer_norm2d(image), F.layer_norm(x.double(), shape[1:]).unsqueeze(-1).expand_as(image), 2e-6, "2d")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=dtype_id)
def test_results_are_within_one_rounding_of_float64(device: torch.device, dtype: torch.dtype) -> None:
    x, weight = (values_of((64, 300)) * 3).to(device, dtype), values_of((300,), 1).to(device, dtype)
    for function in (lambda t, w: layer_norm(t, (300,), w), lambda t, w: rms_norm(t, (300,), w)):
        exact = function(x.double(), weight.double())
        spacing = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
        slack = 0.5 if dtype != torch.float32 else 4
        assert ((function(x, weight).double() - exact).abs() <= (slack + 0.01) * spacing + 1e-6).all()


def test_a_nan_spoils_its_row_only(device: torch.device) -> None:
    for bad in (torch.nan, torch.inf):
        x = values_of((6, 70)).to(device, torch.float32)
        x[1, 2] = bad
        weight = torch.ones(70, device=device)
        for y in (layer_norm(x, (70,), weight), rms_norm(x, (70,), weight)):
            assert y[1].isnan().any()
            assert y[[0, 2, 3, 4, 5]].isfinite().all()
        y = layer_norm2d(x.t().unsqueeze(0).contiguous())
        assert y[0, :, 1].isnan().all()
        assert y[0, :, [0, 2, 3, 4, 5]].isfinite().all()


def test_gradients_of_a_constant_row_of_large_values(device: torch.device) -> None:
    """The lanes past the end of a row must not contribute: they would be infinite here."""
    x = torch.full((3, 37), 1e38, device=device, requires_grad=True)
    grad = values_of((3, 37)).to(device, torch.float32)
    found = torch.autograd.grad(layer_norm(x, (37,)), x, grad)[0]
    expected = (grad.double() - grad.double().mean(1, keepdim=True)) / EPS**0.5
    assert_close(found, expected, 1e-5, "gradient")


def test_rows_of_one_value(device: torch.device) -> None:
    x, bias = (values_of(s).to(device, torch.float32) for s in ((5, 1), (1,)))
    y = layer_norm(x.requires_grad_(), (1,), None, bias)
    assert torch.equal(y, bias.expand(5, 1))
    grad = torch.autograd.grad(y, x, torch.ones_like(y))[0]  # the terms are 1 / sqrt(eps), and cancel
    assert grad.abs().max() <= 1e-6 / EPS**0.5
    assert_close(rms_norm(x, (1,)), x.sign(), 1e-5, "rms")
