"""Group norm and instance norm, as functions and layers, compared with torch in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import DTYPES, LAYOUTS, assert_same_bits, dtype_id, lay_out, recording_subclass, sample_id
from torch import Tensor, nn
from torch.nn import functional as F

import normfused
from normfused import reference
from normfused.activations import ACTIVATION_PARAMS, ACTIVATIONS
from normfused.functional import group_norm, instance_norm

# Shapes and numbers of groups. Together they take every branch of the plans: one and several statistics in a task,
# parts of rows and of positions, more channels than fit one unit, channels of one value.
SHAPES = [
    ((2, 6, 5, 7), 3),
    ((3, 64, 9, 9), 1),
    ((2, 320, 16, 16), 32),
    ((1, 4, 300, 300), 2),
    ((1, 2, 500, 600), 1),
    ((40, 12, 3, 3), 4),
    ((2, 1280, 40), 8),
    ((2, 16, 4, 5, 6), 16),
    ((6, 32), 4),
    ((3, 6, 2, 2), 6),
    ((1, 1, 7), 1),
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def values_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_torch(x: Tensor, groups: int, tensors: dict[str, Tensor | None], activation: str) -> Tensor:
    """The same by torch's operators, in float64. torch fails in backward with a bias but no weight."""
    y = F.group_norm(x, groups)
    for name in ("weight", "bias", "scale", "shift", "residual"):
        value = tensors[name]
        if value is None:
            continue
        if name != "residual":
            value = value.reshape(-1, x.size(1), *[1] * (x.dim() - 2))
        y = y * (value + (name == "scale")) if name in ("weight", "scale") else y + value
    return ACTIVATIONS[activation](y, ACTIVATION_PARAMS.get(activation, 0.0))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float, name: str) -> None:
    error = (ours.double().cpu() - theirs.cpu()).abs().max() / (theirs.abs().max().cpu() + 1e-3)
    assert error <= tolerance, f"{name}: {error:.2e}"


def check_call(
    x: Tensor, groups: int, parameter_dtype: torch.dtype, options: str = "", activation: str = "identity"
) -> None:
    """Output and gradients. `options`: which of residual, scale and shift are given, weight and bias are absent."""
    shape = tuple(x.shape)
    names = ("input", "weight", "bias", "residual", "scale", "shift")
    shapes = (shape, shape[1:2], shape[1:2], shape, shape[:2], shape[:2])
    absent = {name for name in ("weight", "bias") if name in options}
    absent |= {name for name in ("residual", "scale", "shift") if name not in options}
    tensors: dict[str, Tensor | None] = {}
    for seed, (name, size) in enumerate(zip(names, shapes, strict=True)):
        dtype = x.dtype if name in ("input", "residual") else parameter_dtype
        value = x if name == "input" else values_of(size, seed).to(x.device, dtype)
        tensors[name] = None if name in absent else value.detach().requires_grad_()
    wide = {k: None if t is None else t.detach().double().requires_grad_() for k, t in tensors.items()}
    arguments = {k: t for k, t in tensors.items() if k != "input"}
    y = group_norm(tensors["input"], groups, **arguments, activation=activation)
    z = by_torch(wide["input"], groups, wide, activation)
    grad = values_of(shape, 9).to(x.device, x.dtype)
    given = [name for name in names if tensors[name] is not None]
    ours = torch.autograd.grad(y, [tensors[n] for n in given], grad)
    theirs = torch.autograd.grad(z, [wide[n] for n in given], grad.double())
    tolerance = TOLERANCE[x.dtype]
    assert (y.dtype, y.stride()) == (x.dtype, torch.empty_like(normfused.layout.as_dense(x)).stride())
    assert_close(y, z, tolerance, "output")
    for name, a, b in zip(given, ours, theirs, strict=True):
        assert a.dtype == tensors[name].dtype
        assert_close(a, b, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=sample_id)
def test_every_shape(
    device: torch.device, shape: tuple[int, ...], groups: int, dtypes: tuple[torch.dtype, torch.dtype], layout: str
) -> None:
    x = lay_out((values_of(shape) * 2 + 1).to(device, dtypes[0]), layout)
    check_call(x, groups, dtypes[1])
    check_call(x, groups, dtypes[1], "residual", "silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", ["", "residual", "scale shift", "scale", "shift weight", "weight bias residual scale"]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_option(device: torch.device, layout: str, options: str, activation: str) -> None:
    x = lay_out(values_of((3, 8, 5, 6)).to(device) + 0.5, layout)
    check_call(x, 2, torch.float64, options, activation)
    check_call(x.to(torch.bfloat16), 2, torch.float32, options, activation)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((8, 4, 4), 2),
        ((32, 7, 7), 8),
        ((6, 2, 2), 6),
        ((9, 5, 7), 3),
        pytest.param((8, 70, 80), 2, marks=pytest.mark.exhaustive),
        pytest.param((2, 300, 300), 1, marks=pytest.mark.exhaustive),
        ((16,), 4),
    ],
    ids=sample_id,
)
def test_a_sample_does_not_depend_on_the_batch(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: str, needs_extension: None, thread_count: None
) -> None:
    """Output and gradient are the same to the last bit in 50 batch sizes, at any place, with any number of threads."""
    large = torch.Size(shape).numel() > 30_000
    sizes = range(1, 51) if large else [*range(1, 45), 64, 100, 128, 200, 256, 300]
    samples = lay_out(values_of((max(sizes) if not large else 50, *shape)).to(dtype), "contiguous")
    grads = values_of(samples.shape, 1).to(dtype)
    weight, bias = values_of((shape[0],), 2).float(), values_of((shape[0],), 3).float()

    def run(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        x = lay_out(x, layout).requires_grad_()
        y = group_norm(x, groups, weight, bias, activation="silu")
        return y.detach().contiguous(), torch.autograd.grad(y, x, grad)[0].contiguous()

    torch.set_num_threads(1)
    expected = [run(samples[i : i + 1], grads[i : i + 1]) for i in range(4)]
    for number, size in enumerate(sizes):
        torch.set_num_threads(1 + number % 4)
        place = number % (size if size < 4 else size - 3)
        order = torch.roll(torch.arange(size), place)
        chosen = order % 4 if large else order
        y, grad = run(samples[chosen], grads[chosen])
        for i in range(size):
            if chosen[i] < 4:
                assert_same_bits(y[i : i + 1], expected[chosen[i]][0])
                assert_same_bits(grad[i : i + 1], expected[chosen[i]][1])


@pytest.mark.parametrize("channels", [67, 129])
@pytest.mark.parametrize("dims", [2, 3])
def test_large_outputs_of_one_position(device: torch.device, channels: int, dims: int) -> None:
    """Outputs of 20 MiB and more bypass the caches where they are aligned, which such groups are not."""
    x = torch.randn(76800, channels, *[1] * (dims - 2), device=device, requires_grad=True)
    y, expected = normfused.functional.group_norm(x, 1), F.group_norm(x, 1)
    torch.testing.assert_close(y, expected)
    actual_grad, expected_grad = (torch.autograd.grad(output, x, x.detach())[0] for output in (y, expected))
    torch.testing.assert_close(actual_grad, expected_grad, atol=1e-5, rtol=1e-4)


def test_scale_and_shift_in_float32_beside_half(device: torch.device) -> None:
    x = values_of((2, 4, 6)).to(device, torch.float16)
    scale, shift = (values_of((2, 4), seed).to(device, torch.float32) for seed in (1, 2))
    y = group_norm(x, 2, scale=scale, shift=shift)
    expected = F.group_norm(x.double(), 2) * (1 + scale.double().unsqueeze(-1)) + shift.double().unsqueeze(-1)
    assert_close(y, expected, 1e-3, "output")


@pytest.mark.parametrize("residual_dtype", [torch.float64, torch.float32, torch.float16], ids=dtype_id)
def test_a_residual_of_another_dtype_is_promoted(device: torch.device, residual_dtype: torch.dtype) -> None:
    x, residual = values_of((2, 4, 6)).to(device, torch.float32), values_of((2, 4, 6), 1).to(device, residual_dtype)
    expected = F.relu(F.group_norm(x, 2) + residual)
    y = group_norm(x, 2, residual=residual, activation="relu")
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)


# ---- numerics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=dtype_id)
def test_constant_groups_give_exactly_the_bias(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    for value in (0.1, 300.0, 1e-6, -7.3):
        x = lay_out(torch.full((2, 6, 33, 35), value, device=device, dtype=dtype), layout)
        bias = values_of((6,)).to(device, dtype)
        assert torch.equal(group_norm(x, 2, bias=bias), bias.view(1, -1, 1, 1).expand_as(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1e10, 1e19, 1e25])
def test_every_magnitude_of_float32(device: torch.device, magnitude: float, layout: str) -> None:
    x = lay_out((values_of((2, 6, 9, 11)) * magnitude).to(device, torch.float32), layout)
    y = group_norm(x, 2, eps=0.0)
    assert_close(y, F.group_norm(x.double(), 2, eps=0.0), 1e-5, "output")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_mean_much_larger_than_the_deviation(device: torch.device, layout: str) -> None:
    x = lay_out((values_of((2, 6, 40, 40)) + 3000).to(device, torch.float32), layout)
    assert_close(group_norm(x, 2), F.group_norm(x.double(), 2), 1e-6, "output")


def test_a_nan_spoils_its_group_only(device: torch.device) -> None:
    for bad in (torch.nan, torch.inf):
        x = values_of((2, 4, 5)).to(device, torch.float32)
        x[1, 2, 3] = bad
        y = group_norm(x, 2)
        assert y[1, 2:].isnan().all()
        assert y[0].isfinite().all()
        assert y[1, :2].isfinite().all()


# ---- derivatives and transforms ------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["identity", "silu", "relu", "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck_and_gradgradcheck(device: torch.device, activation: str, with_residual: bool) -> None:
    def leaf(shape: tuple[int, ...], seed: int) -> Tensor:
        return values_of(shape, seed).to(device).requires_grad_()

    inputs = [leaf((2, 4, 3), 0), leaf((4,), 1), leaf((4,), 2), leaf((2, 4), 3), leaf((2, 4), 4)]
    inputs += [leaf((2, 4, 3), 5)] if with_residual else []

    def function(*tensors: Tensor) -> Tensor:
        x, weight, bias, scale, shift, *rest = tensors
        options = {"residual": rest[0]} if rest else {}
        return group_norm(x, 2, weight, bias, activation=activation, scale=scale, shift=shift, **options)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_transforms_of_torch_func(device: torch.device) -> None:
    x, weight = values_of((5, 2, 4, 3)).to(device), values_of((4,), 1).to(device)

    def ours(x: Tensor) -> Tensor:
        return group_norm(x, 2, weight, activation="silu")

    def theirs(x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 2, weight))

    assert_close(torch.vmap(ours)(x), torch.vmap(theirs)(x), 1e-12, "vmap")
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        a, b = (transform(lambda x, f=f: f(x).square().sum())(x[0]) for f in (ours, theirs))
        assert_close(a, b, 1e-10, transform.__name__)


def cases(device: torch.device) -> list[tuple[Any, ...]]:
    x = values_of((2, 4, 5, 3)).to(device, torch.float32)
    weight, bias = (values_of((4,), seed).to(device, torch.float32) for seed in (1, 2))
    by_sample = values_of((2, 4), 3).to(device, torch.float32)
    return [
        (x, 2, weight, bias, 1e-5),
        (lay_out(x, "channels_last"), 4, None, None, 1e-5, x, "relu", 0.0),
        (x, 1, by_sample, bias, 1e-5, x, "silu", 0.0),
        (x.to(torch.bfloat16), 2, weight, by_sample, 1e-3, None, "leaky_relu", 0.1),
    ]


@pytest.mark.parametrize("number", range(4))
def test_opcheck(device: torch.device, number: int, needs_extension: None) -> None:
    arguments = cases(device)[number]
    torch.library.opcheck(torch.ops.normfused.group_norm.default, arguments)
    x, groups, weight, bias, _, *after = arguments
    statistics = torch.ops.normfused.group_norm(*arguments)[1]
    residual, activation, parameter = after or (None, "identity", 0.0)
    operator = torch.ops.normfused.group_norm_backward.default
    backward = (torch.randn_like(x), x, groups, weight, statistics, [True] * 4, bias, residual, None, activation)
    torch.library.opcheck(operator, (*backward, parameter), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(device: torch.device, dynamic: bool) -> None:
    torch._dynamo.reset()
    layers = (
        normfused.GroupNorm(2, 4, device=device),
        normfused.GroupNormAct(2, 4, "silu", device=device),
        normfused.InstanceNorm2d(4, affine=True, track_running_stats=True, device=device),
        normfused.InstanceNormAct2d(4, device=device),
    )
    for layer in layers:
        compiled_layer = copy.deepcopy(layer)
        compiled = torch.compile(compiled_layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for size in (2, 3):
            x = values_of((size, 4, 5, 6), size).to(device, torch.float32).requires_grad_()
            y, z = compiled(x, x), layer(x, x)
            torch.testing.assert_close(y, z)
            torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, z)))
        for a, b in zip(compiled_layer.buffers(), layer.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_exported_and_traced(device: torch.device) -> None:
    layer = normfused.GroupNormAct(2, 4, "silu", device=device).eval().requires_grad_(False)
    x, scale = values_of((2, 4, 5)).to(device, torch.float32), values_of((2, 4), 1).to(device, torch.float32)
    expected = layer(x, scale=scale)
    exported = torch.export.export(layer, (x,), {"scale": scale}, strict=False)
    torch.testing.assert_close(exported.module()(x, scale=scale), expected)
    traced = torch.jit.trace(lambda x, scale: layer(x, scale=scale), (x, scale))
    torch.testing.assert_close(traced(x, scale), expected)
    plain = normfused.GroupNorm(2, 4, device=device)
    torch.testing.assert_close(torch.jit.script(plain)(x), plain(x))
    with pytest.raises(RuntimeError, match=r"^torch\.jit\.script cannot compile GroupNormAct"):
        torch.jit.script(layer)


@pytest.mark.parametrize("options", [{}, {"affine": True, "track_running_stats": True}], ids=str)
def test_instance_norm_traced(device: torch.device, options: dict[str, Any]) -> None:
    x, scale = values_of((2, 4, 5)).to(device, torch.float32), values_of((2, 4), 1).to(device, torch.float32)
    for training in (True, False):
        layer = normfused.InstanceNormAct1d(4, "silu", **options, device=device).train(training).requires_grad_(False)
        given = {"scale": scale} if training or not options else {}
        first, second = copy.deepcopy(layer), copy.deepcopy(layer)
        expected = first(x, x, **given)
        traced = torch.jit.trace(lambda x: second(x, x, **given), x, check_trace=False)  # noqa: B023
        torch.testing.assert_close(traced(x), expected)
        graph = torch.fx.symbolic_trace(copy.deepcopy(layer), concrete_args={"scale": None, "shift": None})
        torch.testing.assert_close(graph(x, x), copy.deepcopy(layer)(x, x))


def test_reference(device: torch.device) -> None:
    for (shape, groups), activation in itertools.product(SHAPES[:4], ("identity", "silu")):
        x, weight = values_of(shape).to(device), values_of(shape[1:2], 1).to(device)
        ours = group_norm(x, groups, weight, activation=activation)
        torch.testing.assert_close(ours, reference.group_norm(x, groups, weight, activation=activation))


# ---- layers --------------------------------------------------------------------------------------

PAIRS: list[tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = [
    ("GroupNorm", (2, 4), {}, (3, 4, 5)),
    ("GroupNorm", (2, 4), {"affine": False, "eps": 1e-3}, (3, 4, 5, 6)),
    ("InstanceNorm1d", (4,), {}, (3, 4, 5)),
    ("InstanceNorm1d", (4,), {"affine": True}, (4, 5)),
    ("InstanceNorm2d", (4,), {"affine": True, "track_running_stats": True}, (3, 4, 5, 6)),
    ("InstanceNorm2d", (4,), {"track_running_stats": True, "momentum": None}, (4, 5, 6)),
    ("InstanceNorm3d", (4,), {"affine": True, "momentum": 0.3, "track_running_stats": True}, (3, 4, 5, 2, 3)),
]


@pytest.mark.parametrize(("name", "arguments", "options", "shape"), PAIRS)
def test_layers_are_torchs(
    device: torch.device, name: str, arguments: tuple[Any, ...], options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    ours = getattr(normfused, name)(*arguments, **options, device=device)
    theirs = getattr(nn, name)(*arguments, **options, device=device)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(values_of(tuple(parameter.shape)))
    ours.load_state_dict(theirs.state_dict())
    for step in range(3):
        x = values_of(shape, step).to(device, torch.float32) * 2 + 1
        torch.testing.assert_close(ours(x), theirs(x))
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_no_bias() -> None:
    for layer in (
        normfused.GroupNorm(2, 4, bias=False),
        normfused.GroupNormAct(2, 4, bias=False),
        normfused.InstanceNorm2d(4, affine=True, bias=False),
    ):
        assert layer.bias is None
        assert layer.weight.shape == (4,)


@pytest.mark.parametrize(
    ("name", "dims"), [("InstanceNormAct1d", 3), ("InstanceNormAct2d", 4), ("InstanceNormAct3d", 5)]
)
def test_layers_with_an_activation(device: torch.device, name: str, dims: int) -> None:
    x = values_of((2, 4, *[3] * (dims - 2))).to(device, torch.float32)
    layer = getattr(normfused, name)(4, "leaky_relu", 0.2, affine=True, track_running_stats=True, device=device)
    plain = getattr(nn, name.replace("Act", ""))(4, affine=True, track_running_stats=True, device=device)
    torch.testing.assert_close(layer(x, x), F.leaky_relu(plain(x) + x, 0.2))
    torch.testing.assert_close(layer.running_var, plain.running_var)
    torch.testing.assert_close(layer.eval()(x[0], x[0]), F.leaky_relu(plain.eval()(x[0]) + x[0], 0.2))
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert "activation=leaky_relu, activation_param=0.2" in repr(layer)
    assert "activation=silu" in repr(normfused.GroupNormAct(2, 4))
    group = normfused.GroupNormAct(2, 4, "silu", device=device)
    torch.testing.assert_close(group(x), F.silu(F.group_norm(x, 2)))


def test_another_number_of_channels_without_parameters() -> None:
    x = values_of((2, 3, 5))
    with pytest.warns(UserWarning, match="^input's size at dim=1 does not match num_features"):
        torch.testing.assert_close(normfused.InstanceNorm1d(4)(x), F.instance_norm(x))
    with pytest.raises(ValueError, match=r"^InstanceNorm1d: expected .* num_features \(4\), got 3$"):
        normfused.InstanceNorm1d(4, affine=True, dtype=torch.float64)(x)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (0, 4, 3, 3), (4, 4, 0, 0), (2, 0, 3)], ids=str)
def test_empty_inputs(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    weight = torch.ones(shape[1], device=device, requires_grad=True)
    y = group_norm(x, 1 if shape[1] == 0 else 2, weight)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    batched = torch.vmap(lambda x: group_norm(x, 1))(x.detach().unsqueeze(0))
    assert batched.shape == (1, *shape)
    (grad,) = torch.autograd.grad(group_norm(x, 1).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x, allow_unused=True, materialize_grads=True)[0].shape == shape
    running = torch.zeros(shape[1], device=device)
    instance_norm(x, running, running.clone())
    assert torch.equal(running, torch.zeros_like(running))


def test_subclasses_of_tensors_see_the_call() -> None:
    subclass, calls = recording_subclass()
    assert isinstance(group_norm(values_of((2, 4, 3)).as_subclass(subclass), 2), subclass)
    assert "_run" in calls
    instance_norm(values_of((2, 4, 3)).as_subclass(subclass))
    assert "run_instance_norm" in calls


# ---- bad input -----------------------------------------------------------------------------------

X = values_of((2, 4, 5)).float()
BY_SAMPLE = X[:, :, 0]
RUNNING = (torch.zeros(4), torch.ones(4))


def group(*arguments: Any, x: Any = X, groups: Any = 2, **options: Any) -> Callable[[], object]:
    return lambda: group_norm(x, groups, *arguments, **options)


def instance(*arguments: Any, x: Tensor = X, **options: Any) -> Callable[[], object]:
    return lambda: instance_norm(x, *arguments, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (group(groups=3), ValueError, r"num_groups must divide .*, got 3 for input of shape \(2, 4, 5\)"),
        (group(groups=0), ValueError, r"num_groups must divide .*, got 0"),
        (group(groups=2.0), TypeError, r"num_groups must be an int, got float"),
        (group(x=X[0, 0]), ValueError, r"input needs at least 2 dimensions \(N, C, ...\), got shape \(5,\)"),
        (group(x=X.long()), TypeError, r"input must be float32, float64, float16 or bfloat16, got torch\.int64"),
        (group(x=[1.0]), TypeError, r"input must be a tensor, got list"),
        (group(x=X[:1, :, :1], groups=4), ValueError, r"expected more than 1 value per group, .* \(1, 4, 1\)"),
        (group(torch.ones(3)), ValueError, r"weight must have shape \(4,\) for .*, got \(3,\)"),
        (group(torch.ones(2, 4)), ValueError, r"weight must have shape \(4,\) for .*, got \(2, 4\)"),
        (group(None, torch.ones(4).half()), TypeError, r"bias must be torch\.float32 .*, got torch\.float16"),
        (group(eps=-1.0), ValueError, r"eps must be a non-negative finite number, got -1\.0"),
        (group(eps=float("nan")), ValueError, r"eps must be a non-negative finite number, got nan"),
        (group(activation="swish"), ValueError, r"unknown activation 'swish': must be one of identity, relu"),
        (group(residual=X[:1]), ValueError, r"residual must have input's shape \(2, 4, 5\), got \(1, 4, 5\)"),
        (group(residual=X.long()), TypeError, r"residual must be float32, .*, got torch\.int64"),
        (group(scale=X[0, :, 0]), ValueError, r"scale must have shape \(2, 4\) for .*, got \(4,\)"),
        (group(shift=BY_SAMPLE.double()), TypeError, r"shift must be torch\.float32 .*, got torch\.float64"),
        (group(scale=BY_SAMPLE.to("meta")), ValueError, r"scale is on meta, but input is on cpu"),
        (instance(x=X[:, :, :1]), ValueError, r"expected more than 1 value per channel of a sample, .* \(2, 4, 1\)"),
        (instance(x=BY_SAMPLE), ValueError, r"input needs at least 3 dimensions"),
        (instance(RUNNING[0]), ValueError, r"running_mean and running_var must be given together"),
        (instance(torch.zeros(3), torch.ones(3)), ValueError, r"running_mean must have shape \(4,\)"),
        (instance(*RUNNING, momentum=float("inf")), ValueError, r"momentum must be a finite number, got inf"),
        (instance(*RUNNING, use_input_stats=False, scale=BY_SAMPLE), ValueError, r"scale and shift need use_input"),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^(group|instance)_norm: {message}"):
        call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (instance(use_input_stats=False), ValueError, r"running_mean and running_var are needed when training=False"),
        (lambda: normfused.GroupNorm(3, 4), ValueError, r"num_channels \(4\) must be divisible by num_groups \(3\)"),
        (lambda: normfused.GroupNorm(0, 4), ValueError, r"^GroupNorm: num_groups must be at least 1, got 0"),
        (lambda: normfused.GroupNormAct(2, 4, "swish"), ValueError, r"^GroupNormAct: unknown activation 'swish'"),
        (lambda: normfused.GroupNormAct(2, 4, "silu", 0.1), ValueError, r"^GroupNormAct: activation_param applies to"),
        (lambda: normfused.GroupNorm(2, 4)(X.double()), TypeError, r"^GroupNorm: weight must be torch\.float64"),
        (
            lambda: normfused.InstanceNorm2d(4)(BY_SAMPLE),
            ValueError,
            r"expected a 3D or 4D input, got 2D input of",
        ),
        (lambda: normfused.InstanceNormAct2d(4)(BY_SAMPLE), ValueError, r"expected a 3D or 4D input, got 2D input of"),
    ],
)
def test_bad_layers(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_operators_refuse_what_would_be_out_of_bounds(needs_extension: None) -> None:
    operator, backward = torch.ops.normfused.group_norm, torch.ops.normfused.group_norm_backward
    for groups, weight in ((3, None), (2, torch.ones(3)), (2, torch.ones(3, 4)), (-1, None)):
        with pytest.raises(ValueError, match=r"num_groups|weight"):
            operator(X, groups, weight, None, 1e-5)
    with pytest.raises(ValueError, match="statistics"):
        backward(X, X, 2, None, torch.zeros(2, 2, 3, dtype=torch.float64), [True] * 4)
    with pytest.raises(ValueError, match="grad_output"):
        backward(X[:1], X, 2, None, torch.zeros(2, 2, 2, dtype=torch.float64), [True] * 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_autocast_casts_every_16_bit_tensor(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """As torch's autocast on CUDA, also parameters of a float32 input. The rule is tested, so any device will do."""
    monkeypatch.setattr("normfused.sample_norms.is_autocast", lambda input: True)
    x, weight, bias = (values_of(shape, i) for i, shape in enumerate([(3, 8, 5, 6), (8,), (8,)]))
    want = F.group_norm(x.to(dtype).float(), 2, weight.to(dtype).float(), bias.to(dtype).float())
    for input in (x.to(dtype), x.to(dtype).float()):
        y = group_norm(input, 2, weight.to(dtype), bias.to(dtype))
        torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
        assert y.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"running_mean": torch.zeros(5)}, "running_mean"),
        ({"activation": "swish"}, "activation"),
        ({"residual": torch.zeros(2, 3, 4, 4)}, "residual"),
        ({"eps": -1.0}, "eps"),
    ],
)
def test_errors_of_evaluation_name_instance_norm(change: dict[str, Any], message: str) -> None:
    arguments = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "use_input_stats": False, **change}
    with pytest.raises(ValueError, match=rf"^instance_norm: .*{message}"):
        instance_norm(torch.zeros(2, 3, 4, 5), **arguments)
