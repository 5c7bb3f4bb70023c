"""Layer norm and RMS norm, over the last dimensions and over channels, compared with torch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import DTYPES, LAYOUTS, assert_same_bits, dtype_id, lay_out, sample_id
from torch import Tensor, nn
from torch.nn import functional as F

import normfused
from normfused import reference
from normfused.functional import layer_norm, layer_norm2d, rms_norm, rms_norm2d

TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
EPS = 1e-5
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


def values_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ours(x: Tensor, dims: int | None, rms: bool, tensors: dict[str, Tensor | None], scale_offset: float = 0.0) -> Any:
    """The function for `dims` normalized dimensions, None for channels."""
    options = {name: tensors.get(name) for name in ("residual", "scale", "shift")}
    arguments = (tensors.get("weight"),) if rms else (tensors.get("weight"), tensors.get("bias"))
    if dims is None:
        function: Any = rms_norm2d if rms else layer_norm2d
        return function(x, *arguments, EPS, **options, scale_offset=scale_offset)
    function = rms_norm if rms else layer_norm
    return function(x, x.shape[-dims:], *arguments, EPS, **options, scale_offset=scale_offset)


def by_torch(
    x: Tensor, dims: int | None, rms: bool, tensors: dict[str, Tensor | None], scale_offset: float = 0.0
) -> Any:
    """The same by torch's operators."""
    total = x if tensors.get("residual") is None else x + tensors["residual"]
    moved = total.movedim(1, -1) if dims is None else total
    shape = moved.shape[-(dims or 1) :]
    y = F.rms_norm(moved, shape, None, EPS) if rms else F.layer_norm(moved, shape, None, None, EPS)
    for name in ("weight", "bias", "scale", "shift"):
        value = tensors.get(name)
        if value is None or (rms and name == "bias"):
            continue
        if name in ("scale", "shift"):
            value = value.reshape(x.size(0), *[1] * (x.dim() - 1 - len(shape)), *shape)
        value = value + (name == "scale") + scale_offset * (name == "weight")
        y = y * value if name in ("weight", "scale") else y + value
    return (y.movedim(-1, 1) if dims is None else y), total


def assert_close(a: Tensor, b: Tensor, tolerance: float, name: str) -> None:
    error = (a.double().cpu() - b.double().cpu()).abs().max() / (b.abs().max().cpu() + 1e-3)
    assert error <= tolerance, f"{name}: {error:.2e}"


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


# ---- derivatives and transforms ------------------------------------------------------------------


@pytest.mark.parametrize("dims", [None, 1, 2])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck_and_gradgradcheck(device: torch.device, rms: bool, with_residual: bool, dims: int | None) -> None:
    shape = (2, 3, 4, 2) if dims is None else (2, 3, 4)
    normalized = shape[1:2] if dims is None else shape[-dims:]
    shapes = [shape, normalized, normalized, (shape[0], *normalized), (shape[0], *normalized)]
    shapes += [shape] if with_residual else []
    inputs = [values_of(s, seed).to(device).requires_grad_() for seed, s in enumerate(shapes)]

    def function(*tensors: Tensor) -> Any:
        names = ("weight", "bias", "scale", "shift", "residual")
        return ours(tensors[0], dims, rms, dict(zip(names, tensors[1:], strict=False)))

    if rms:
        inputs[2].requires_grad_(False)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dims", [None, 1])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_transforms_of_torch_func(device: torch.device, rms: bool, dims: int | None) -> None:
    x, weight = values_of((5, 2, 4, 3)).to(device), values_of((4 if dims is None else 3,), 1).to(device)
    functions = (
        lambda x: ours(x, dims, rms, {"weight": weight}),
        lambda x: by_torch(x, dims, rms, {"weight": weight})[0],
    )
    assert_close(*(torch.vmap(f)(x) for f in functions), 1e-12, "vmap")
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        a, b = (transform(lambda x, f=f: f(x).pow(3).sum())(x[0]) for f in functions)
        assert_close(a, b, 1e-10, transform.__name__)


def cases(device: torch.device) -> list[tuple[Any, ...]]:
    x = values_of((2, 4, 5, 3)).to(device, torch.float32)
    channels, by_sample = (values_of(s, 3).to(device, torch.float32) for s in ((4,), (2, 4)))
    rows = [values_of(s, 4).to(device, torch.float32) for s in ((3,), (5, 3), (2, 3))]
    return [
        (x, 1, 1, channels, channels, 1e-5),
        (lay_out(x, "channels_last"), 1, 1, by_sample, channels, 1e-5, x, False),
        (x, 3, 3, rows[0], None, 1e-5, x),
        (x.to(torch.bfloat16), 2, 3, rows[1], rows[1], 1e-3),
        (x, 3, 3, rows[2], rows[0], 1e-3, None, False),
        (lay_out(x, "channels_last"), 3, 3, None, None, 1e-3, None, False),
    ]


@pytest.mark.parametrize("number", range(6))
def test_opcheck(device: torch.device, number: int, needs_extension: None) -> None:
    arguments = cases(device)[number]
    torch.library.opcheck(torch.ops.normfused.layer_norm.default, arguments)
    x, start, end, weight, bias, _, *after = arguments
    statistics = torch.ops.normfused.layer_norm(*arguments)[2]
    subtract_mean = after[1] if len(after) > 1 else True
    operator = torch.ops.normfused.layer_norm_backward.default
    backward = (torch.randn_like(x), x, start, end, weight, bias, statistics, [True] * 3, torch.randn_like(x))
    torch.library.opcheck(operator, (*backward, subtract_mean), test_utils=("test_schema", "test_faketensor"))


def layers(device: torch.device) -> list[tuple[nn.Module, tuple[int, ...]]]:
    return [
        (normfused.LayerNorm(6, device=device), (4, 5, 6)),
        (normfused.LayerNorm((5, 6), elementwise_affine=False, device=device), (4, 5, 6)),
        (normfused.RMSNorm(6, scale_offset=1, device=device), (4, 5, 6)),
        (normfused.LayerNorm2d(4, device=device), (4, 5, 6)),
        (normfused.RMSNorm2d(4, device=device), (4, 5, 6, 2)),
    ]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("number", range(5))
def test_compiled(device: torch.device, dynamic: bool, number: int) -> None:
    torch._dynamo.reset()
    layer, shape = layers(device)[number]
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (2, 3):
        batch = (size, *((4,) if number > 2 else ()), *shape[1:])
        x, residual = (values_of(batch, seed).to(device, torch.float32).requires_grad_() for seed in (0, 1))
        torch.testing.assert_close(compiled(x), layer(x))
        y, z = compiled(x, residual), layer(x, residual)
        torch.testing.assert_close(y, z)
        grads = [torch.autograd.grad(a.pow(3).sum() + b.square().sum(), (x, residual)) for a, b in (y, z)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("number", range(5))
def test_exported_and_traced(device: torch.device, number: int) -> None:
    layer, shape = layers(device)[number]
    layer.requires_grad_(False)
    x = values_of((2, *((4,) if number > 2 else ()), *shape[1:])).to(device, torch.float32)
    expected = layer(x, x)
    exported = torch.export.export(layer, (x, x), strict=False)
    torch.testing.assert_close(exported.module()(x, x), expected)
    torch.testing.assert_close(torch.jit.trace(layer, (x, x))(x, x), expected)
    graph = torch.fx.symbolic_trace(layer, concrete_args={"residual": None, "scale": None, "shift": None})
    torch.testing.assert_close(graph(x), layer(x))
    if number in (0, 1):
        torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    else:
        message = "would lose scale_offset=1.0" if number == 2 else "cannot compile"
        with pytest.raises(RuntimeError, match=f"torch.jit.script {message}"):
            torch.jit.script(layer)


def test_reference(device: torch.device) -> None:
    x, weight = values_of((3, 4, 5)).to(device), values_of((3, 5), 1).to(device)
    expected = layer_norm(x, (5,), scale=weight - 1)
    torch.testing.assert_close(reference.layer_norm(x, 2, 2, weight), expected)
    residual = values_of((3, 4, 5), 2).to(device)
    torch.testing.assert_close(
        reference.layer_norm(x, 1, 1, eps=1e-6, residual=residual, subtract_mean=False),
        rms_norm2d(x, residual=residual)[0],
    )


# ---- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "options", "shape"),
    [
        ("LayerNorm", (6,), {}, (3, 4, 6)),
        ("LayerNorm", ((4, 6),), {"bias": False, "eps": 1e-3}, (3, 4, 6)),
        ("LayerNorm", ([6],), {"elementwise_affine": False}, (6,)),
        ("RMSNorm", (6,), {}, (3, 4, 6)),
        ("RMSNorm", ((4, 6),), {"elementwise_affine": False, "eps": 1e-3}, (3, 4, 6)),
    ],
)
def test_layers_are_torchs(
    device: torch.device, name: str, arguments: tuple[Any, ...], options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    own = getattr(normfused, name)(*arguments, **options, device=device)
    theirs = getattr(nn, name)(*arguments, **options, device=device)
    assert isinstance(own, getattr(nn, name))
    assert repr(own) == repr(theirs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(values_of(tuple(parameter.shape)))
    own.load_state_dict(theirs.state_dict())
    x = values_of(shape).to(device, torch.float32) * 2 + 1
    torch.testing.assert_close(own(x), theirs(x))
    half = copy.deepcopy(own).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["LayerNorm2d", "RMSNorm2d"])
def test_layers_over_channels(device: torch.device, name: str) -> None:
    layer = getattr(normfused, name)(4, device=device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(values_of((4,)))
    x = values_of((2, 4, 3, 5)).to(device, torch.float32)
    moved = x.permute(0, 2, 3, 1)
    plain = getattr(nn, name[:-2])(4, eps=1e-6, device=device)
    plain.load_state_dict(layer.state_dict())
    expected = plain(moved).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), expected)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(last), expected)
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    assert isinstance(layer, type(plain))


def test_scale_offset() -> None:
    layer = normfused.RMSNorm(6, scale_offset=1)
    assert torch.equal(layer.weight, torch.zeros(6))
    assert repr(layer) == "RMSNorm((6,), eps=None, elementwise_affine=True, scale_offset=1)"
    x = values_of((3, 6)).float()
    torch.testing.assert_close(layer(x), F.rms_norm(x, (6,)))
    plain = normfused.LayerNorm(6, elementwise_affine=False, scale_offset=1)  # there is no weight to add it to
    torch.testing.assert_close(plain(x), F.layer_norm(x, (6,)))
    half = normfused.RMSNorm(6, scale_offset=1, dtype=torch.bfloat16)
    nn.init.constant_(half.weight, 1 / 512)  # 1 + 1 / 512 is not a bfloat16
    exact = F.rms_norm(x.bfloat16().double(), (6,)) * (1 + 1 / 512)
    assert torch.equal(half(x.bfloat16()), exact.bfloat16())


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3)], ids=str)
def test_empty_inputs(device: torch.device, shape: tuple[int, ...]) -> None:
    for dims in (None, 1, 2):
        x = torch.empty(shape, device=device, requires_grad=True)
        normalized = shape[1:2] if dims is None else shape[-dims:]
        weight = torch.ones(normalized, device=device, requires_grad=True)
        y, total = ours(x, dims, False, {"weight": weight, "residual": x.detach()})
        assert y.shape == total.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_subclasses_of_tensors_see_the_call() -> None:
    class Seen(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs or {})

    calls: list[str] = []
    assert isinstance(normfused.LayerNorm(3).double()(values_of((2, 3)).as_subclass(Seen)), Seen)
    assert "run_layer_norm" in calls


# ---- bad input -----------------------------------------------------------------------------------

X = values_of((2, 4, 5)).float()


def layer(*arguments: Any, x: Any = X, shape: Any = (5,), **options: Any) -> Callable[[], object]:
    return lambda: layer_norm(x, shape, *arguments, **options)


def images(*arguments: Any, x: Any = X, **options: Any) -> Callable[[], object]:
    return lambda: layer_norm2d(x, *arguments, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (layer(shape=(4,)), ValueError, r"normalized_shape must be the last .* \(2, 4, 5\), got \(4,\)"),
        (layer(shape=(2, 5)), ValueError, r"normalized_shape must be the last dimensions .*, got \(2, 5\)"),
        (layer(shape=(1, 2, 4, 5)), ValueError, r"normalized_shape must be the last dimensions"),
        (layer(shape=()), ValueError, r"normalized_shape must have at least one dimension, got \(\)"),
        (layer(shape=5), TypeError, r"normalized_shape must be a sequence of ints, got the int 5"),
        (layer(x=X.long()), TypeError, r"input must be float32, float64, float16 or bfloat16, got torch\.int64"),
        (layer(x=[1.0]), TypeError, r"input must be a tensor, got list"),
        (layer(x=X.to_sparse()), TypeError, r"input must be a strided tensor"),
        (layer(torch.ones(4)), ValueError, r"weight must have shape \(5,\) for .*, got \(4,\)"),
        (layer(torch.ones(2, 5)), ValueError, r"weight must have shape \(5,\) for .*, got \(2, 5\)"),
        (layer(None, torch.ones(5).half()), TypeError, r"bias must be torch\.float32 .*, got torch\.float16"),
        (layer(torch.ones(5, device="meta")), ValueError, r"weight is on meta, but input is on cpu"),
        (layer(torch.ones(5), [1.0]), TypeError, r"bias must be a tensor or None, got list"),
        (layer(eps=-1.0), ValueError, r"eps must be a non-negative finite number, got -1\.0"),
        (layer(eps=float("nan")), ValueError, r"eps must be a non-negative finite number, got nan"),
        (layer(residual=X[:1]), ValueError, r"residual must have input's shape \(2, 4, 5\), got \(1, 4, 5\)"),
        (layer(residual=X.long()), TypeError, r"residual must be float32, .*, got torch\.int64"),
        (layer(scale=X[0, :, 0]), ValueError, r"scale must have shape \(2, 5\) for .*, got \(4,\)"),
        (layer(shift=X[:, 0].double()), TypeError, r"shift must be torch\.float32 .*, got torch\.float64"),
        (layer(x=X[0, 0], scale=X[0, 0]), ValueError, r"scale needs an input with a dimension of samples before"),
        (layer(scale_offset=float("inf")), ValueError, r"scale_offset must be a finite number, got inf"),
        (images(x=X[0]), ValueError, r"input needs at least 3 dimensions"),
        (images(torch.ones(5)), ValueError, r"weight must have shape \(4,\) for .*, got \(5,\)"),
        (images(scale=torch.ones(4)), ValueError, r"scale must have shape \(2, 4\) for .*, got \(4,\)"),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^layer_norm(2d)?: {message}"):
        call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: normfused.LayerNorm(4)(X), ValueError, r"^LayerNorm: normalized_shape must be the last dimensions"),
        (lambda: normfused.LayerNorm2d(5)(X), ValueError, r"^LayerNorm2d: expected input of shape \(N, 5, ...\), got"),
        (lambda: normfused.RMSNorm2d(4)(X[0]), ValueError, r"^RMSNorm2d: input needs at least 3 dimensions"),
        (lambda: normfused.LayerNorm(5)(X.double()), TypeError, r"^LayerNorm: weight must be torch\.float64"),
        (lambda: normfused.RMSNorm(5, scale_offset=float("nan"))(X), ValueError, r"^RMSNorm: scale_offset must be"),
    ],
)
def test_bad_layers(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_operators_refuse_what_would_be_out_of_bounds(needs_extension: None) -> None:
    operator, backward = torch.ops.normfused.layer_norm, torch.ops.normfused.layer_norm_backward
    for start, end in ((-1, 2), (2, 1), (0, 3)):
        with pytest.raises(ValueError, match="start_dim and end_dim must be dimensions of input"):
            operator(X, start, end, None, None, 1e-5)
    for start, weight in ((2, torch.ones(4)), (2, torch.ones(3, 5)), (0, torch.ones(2, 2, 4, 5)), (2, torch.ones(()))):
        with pytest.raises(ValueError, match="weight has shape"):
            operator(X, start, 2, weight, None, 1e-5)
    good = torch.zeros(2, 2, 4, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="statistics"):
        backward(X, X, 2, 2, None, None, good[:, :1], [True] * 3)
    with pytest.raises(ValueError, match="grad_output"):
        backward(X[:1], X, 2, 2, None, None, good, [True] * 3)
    with pytest.raises(ValueError, match="grad_sum"):
        backward(X, X, 2, 2, None, None, good, [True] * 3, X[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_autocast_casts_every_16_bit_tensor(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """As torch's autocast on CUDA, also parameters of a float32 input. The rule is tested, so any device will do."""
    monkeypatch.setattr("normfused.layer_norms.is_autocast", lambda input: True)
    x, weight, bias = (values_of(shape, i) for i, shape in enumerate([(3, 5, 8), (8,), (8,)]))
    half = [t.to(dtype) for t in (weight, bias)]
    wide = [t.float() for t in half]
    for input in (x.to(dtype), x.to(dtype).float()):
        y = layer_norm(input, (8,), *half)
        torch.testing.assert_close(y, F.layer_norm(input.float(), (8,), *wide), atol=1e-5, rtol=1e-5)
        y = rms_norm(input, (8,), half[0])
        torch.testing.assert_close(y, F.rms_norm(input.float(), (8,), wide[0]), atol=1e-5, rtol=1e-5)
        assert y.dtype == torch.float32
