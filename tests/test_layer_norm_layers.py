"""Derivatives, transforms, layers and errors of layer norm and RMS norm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import dtype_id, lay_out, recording_subclass
from layer_norm_calls import assert_close, by_torch, ours, values_of
from torch import Tensor, nn
from torch.nn import functional as F

import normfused
from normfused import reference
from normfused.functional import layer_norm, layer_norm2d, rms_norm, rms_norm2d

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
    subclass, calls = recording_subclass()
    assert isinstance(normfused.LayerNorm(3).double()(values_of((2, 3)).as_subclass(subclass)), subclass)
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
