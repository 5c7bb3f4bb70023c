"""The operators under compilers, transforms and higher derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from common import DTYPES, assert_same_bits, dtype_id, lay_out
from torch import Tensor, nn
from torch.nn import functional as F

import normfused
from normfused.functional import batch_norm

pytestmark = pytest.mark.usefixtures("needs_extension")
ops = torch.ops.normfused
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])


@modes
@pytest.mark.parametrize(
    ("layout", "dtypes", "affine"),
    [
        ("contiguous", DTYPES[0], True),
        ("contiguous", DTYPES[1], False),
        ("channels_last", DTYPES[4], True),
        ("sliced", DTYPES[0], True),
        ("permuted", DTYPES[0], False),
    ],
    ids=dtype_id,
)
def test_opcheck_forward(layout: str, dtypes: tuple[torch.dtype, torch.dtype], affine: bool, training: bool) -> None:
    dtype, parameter_dtype = dtypes
    x = lay_out(torch.randn(4, 3, 2, 5).to(dtype), layout).requires_grad_()
    parameters = [torch.randn(3).to(parameter_dtype).requires_grad_() if affine else None for _ in range(2)]
    buffers = torch.zeros(3, dtype=parameter_dtype), torch.ones(3, dtype=parameter_dtype)
    if training:
        for momentum in (0.1, None):
            arguments = (x, *parameters, *buffers, torch.tensor(1), momentum, 1e-5)
            torch.library.opcheck(ops.batch_norm_training.default, arguments)
        torch.library.opcheck(ops.batch_norm_training.default, (x, *parameters, None, None, None, 0.1, 1e-5))
    else:
        torch.library.opcheck(ops.batch_norm_inference.default, (x, *parameters, *buffers, 1e-5))


@modes
@pytest.mark.parametrize(
    ("layout", "mask", "affine"),
    [
        ("contiguous", [True, True, True, False], True),
        ("channels_last", [True, False, False, False], False),
        ("sliced", [False, True, True, False], True),
        ("permuted", [True, True, True, True], False),
    ],
)
def test_opcheck_backward(layout: str, mask: list[bool], affine: bool, training: bool) -> None:
    x = lay_out(torch.randn(4, 3, 2, 5), layout).requires_grad_()
    g = torch.randn(4, 3, 2, 5, requires_grad=True)
    weight = torch.randn(3, requires_grad=True) if affine else None
    statistics = torch.rand(2, 3, dtype=torch.float64) + 0.5
    torch.library.opcheck(ops.batch_norm_backward.default, (g, x, weight, statistics, training, mask))


@layouts
@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (0, 3, 2, 2)], ids=str)
def test_opcheck_channel_statistics(shape: tuple[int, ...], layout: str) -> None:
    x = lay_out(torch.randn(shape), layout)
    torch.library.opcheck(ops.channel_moments.default, (x,))
    torch.library.opcheck(ops.channel_sums.default, (x,))
    torch.library.opcheck(ops.channel_sums.default, ((x * 100).int(),))
    torch.library.opcheck(ops.integer_sums.default, ((x * 100).int(),))


def steps(model: nn.Module, function, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of a few steps, and the parameters' gradients and state at the end."""
    results = []
    for values, grad_output in zip(inputs, grads, strict=True):
        x = values.detach().clone().requires_grad_()
        y = function(x)
        y.backward(grad_output)
        results += [y.detach(), x.grad]
    return results + [p.grad for p in model.parameters()] + [*model.state_dict().values()]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


KINDS = [
    ("training", True, {}),
    ("eval", False, {}),
    ("momentum=None", True, {"momentum": None}),
    ("plain", True, {"affine": False}),
    ("bias=False", True, {"bias": False}),
    ("no statistics", True, {"track_running_stats": False}),
]


def compiled_equals_eager(backend: str, training: bool, arguments: dict, dtype: torch.dtype, layout: str) -> None:
    eager = normfused.BatchNorm2d(6, **arguments).train(training)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    shapes = [(4, 6, 5, 7), (3, 6, 8, 4), (5, 6, 3, 3)]
    inputs = [lay_out(torch.randn(s).to(dtype), layout) for s in shapes]
    grads = [lay_out(torch.randn(s).to(dtype), layout) for s in shapes]
    expected, got = steps(eager, eager, inputs, grads), steps(model, compiled, inputs, grads)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("training", "arguments"), [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])
def test_compiled_is_eager(training: bool, arguments: dict, layout: str) -> None:
    compiled_equals_eager("aot_eager", training, arguments, torch.float32, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_compiled_is_eager_in_half_precision(dtype: torch.dtype) -> None:
    compiled_equals_eager("aot_eager", True, {}, dtype, "contiguous")


def test_compiled_by_inductor_is_eager() -> None:
    compiled_equals_eager("inductor", True, {}, torch.float32, "contiguous")


def test_a_compiled_layer_refuses_one_value_per_channel() -> None:
    compiled = torch.compile(normfused.BatchNorm1d(3), backend="eager")
    with pytest.raises(Exception, match="expected more than 1 value per channel when training"):
        compiled(torch.randn(1, 3))


def test_compiled_functions() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        moments, sums = normfused.channel_moments(x), normfused.channel_sums(x)
        return *moments[1:], *sums[1:]

    for shape in ((4, 3, 5), (7, 3, 2)):
        x = torch.randn(shape)
        expected = (*normfused.channel_moments(x)[1:], *normfused.channel_sums(x)[1:])
        for a, b in zip(statistics(x), expected, strict=True):
            assert_same_bits(a, b)


@modes
def test_export(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), normfused.BatchNorm2d(4), nn.ReLU()).train(training)
    eager = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    mode = "training" if training else "inference"
    assert any(f"batch_norm_{mode}" in str(node.target) for node in program.graph.nodes)
    module = program.module()
    for n in (2, 5):
        x = torch.randn(n, 3, 8, 8)
        assert_same_bits(module(x), eager(x))
    for name, value in eager.state_dict().items():
        assert_same_bits(module.state_dict()[name], value)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@modes
def test_gradcheck_and_gradgradcheck(training: bool, affine: str, layout: str) -> None:
    x = lay_out(double(4, 3, 2), layout).requires_grad_()
    present = {"both": (True, True), "weight": (True, False), "bias": (False, True), "none": (False, False)}
    parameters = [double(3).requires_grad_() if is_present else None for is_present in present[affine]]
    buffers = double(3), double(3).abs() + 0.5

    def function(x: Tensor, *given: Tensor) -> Tensor:
        rest = iter(given)
        w, b = (next(rest) if p is not None else None for p in parameters)
        return batch_norm(x, *(t.clone() for t in buffers), w, b, training)

    inputs = (x, *(p for p in parameters if p is not None))
    # The outputs are weighted, because the gradient of a plain sum is zero.
    torch.autograd.gradcheck(lambda *a: function(*a) * torch.linspace(-1, 2, 24).double().view(4, 3, 2), inputs)
    torch.autograd.gradgradcheck(function, inputs, (double(4, 3, 2).requires_grad_(),))


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
@modes
def test_frozen_inputs(training: bool, frozen: str) -> None:
    values = {"input": double(4, 3, 2), "weight": double(3), "bias": double(3)}
    results = []
    for function in (batch_norm, F.batch_norm):
        x, w, b = (t.clone().requires_grad_(n != frozen) for n, t in values.items())
        y = function(x, torch.zeros(3).double(), torch.ones(3).double(), w, b, training)
        inputs = [t for t in (x, w, b) if t.requires_grad]
        grads = torch.autograd.grad((y**3).sum(), inputs, create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum((g**2).sum() for g in grads), inputs, allow_unused=True)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@modes
def test_func_grad(training: bool) -> None:
    x, w, b, g = double(4, 3, 2), double(3), double(3), double(4, 3, 2)
    buffers = double(3), double(3).abs() + 0.5

    def loss(function):
        statistics = (None, None) if training else buffers
        return lambda x, w, b: (function(x, *statistics, w, b, training) * g).sum()

    ours = torch.func.grad(loss(batch_norm), argnums=(0, 1, 2))(x, w, b)
    theirs = torch.func.grad(loss(F.batch_norm), argnums=(0, 1, 2))(x, w, b)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@modes
def test_vmap(training: bool) -> None:
    x, w, b = double(5, 4, 3, 2), double(3), double(3)
    statistics = (None, None) if training else (double(3), double(3).abs() + 0.5)
    y = torch.func.vmap(lambda x: batch_norm(x, *statistics, w, b, training))(x)
    expected = torch.stack([F.batch_norm(sample, *statistics, w, b, training) for sample in x])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)


def test_per_sample_gradients_of_a_module() -> None:
    module = normfused.BatchNorm1d(3).double().eval()
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    x = double(5, 3)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return (torch.func.functional_call(module, parameters, (sample[None],)) ** 2).sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    normalized = x / (1 + module.eps) ** 0.5
    torch.testing.assert_close(grads["weight"], 2 * normalized**2, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads["bias"], 2 * normalized, rtol=1e-10, atol=1e-12)
