"""In-place batch norm: backward starts from the output. Also runs on the fallback, except for the saved bytes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import DTYPES, LAYOUTS, assert_same_bits, dtype_id, lay_out
from models import resnet18
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import normfused
from normfused.conversion import bytes_saved_for_backward
from normfused.functional import batch_norm

modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
ACTIVATIONS = [(None, None), ("identity", None), ("leaky_relu", None), ("leaky_relu", 0.3), ("leaky_relu", 2.0)]
activations = pytest.mark.parametrize(("activation", "parameter"), ACTIVATIONS, ids=str)


def made(x: Tensor) -> Tensor:
    """A tensor with these values and strides, as the output of an operation that does not save it for backward."""
    return x + torch.zeros_like(x)


def results(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, grad: Tensor, inplace: bool, training: bool, **after: Any
) -> list[Tensor]:
    """Output, all gradients and the running statistics of one pass."""
    leaf = x.detach().requires_grad_()
    parameters = [None if p is None else p.detach().requires_grad_() for p in (weight, bias)]
    dtype = x.dtype if weight is None else weight.dtype
    buffers = x.new_zeros(x.size(1), dtype=dtype), x.new_full((x.size(1),), 2.0, dtype=dtype)
    between = made(leaf)
    y = batch_norm(between, *buffers, *parameters, training, inplace=inplace, **after)
    assert (y is between) == inplace
    inputs = [leaf, *(p for p in parameters if p is not None)]
    return [y.detach().clone(), *torch.autograd.grad(y, inputs, grad), *buffers]


# Weights and biases: of both signs; all or some too small to recover the input from the output; absent.
PARAMETERS: dict[str, Callable[[int], tuple[Tensor | None, Tensor | None]]] = {
    "both signs": lambda c: (torch.linspace(-2, 2.5, c), torch.linspace(-1, 1, c)),
    "small": lambda c: (torch.linspace(-1, 1, c) * 1e-9, torch.zeros(c)),
    "zero": lambda c: (torch.zeros(c), torch.ones(c)),
    "some zero": lambda c: (torch.arange(c) % 3 - 1.0, torch.linspace(-3, 3, c)),
    "subnormal": lambda c: (torch.full((c,), 1e-310, dtype=torch.float64), torch.zeros(c)),
    "large bias": lambda c: (torch.linspace(0.5, 2, c), torch.linspace(-1e6, 1e6, c)),
    "no bias": lambda c: (torch.linspace(-2, 2.5, c), None),
    "none": lambda c: (None, None),
}


@modes
@activations
@pytest.mark.parametrize("parameters", list(PARAMETERS))
@pytest.mark.parametrize("shape", [(4, 7, 5, 3), (64, 33), (3, 1, 70)], ids=str)
def test_equals_out_of_place(
    shape: tuple[int, ...],
    parameters: str,
    activation: str | None,
    parameter: float | None,
    training: bool,
    device: torch.device,
) -> None:
    weight, bias = (None if p is None else p.to(device, torch.float64) for p in PARAMETERS[parameters](shape[1]))
    x, grad = (torch.randn(shape, dtype=torch.float64).to(device) for _ in range(2))
    after = {"activation": activation, "activation_param": parameter}
    ours = results(x * 3 + 1, weight, bias, grad, True, training, **after)
    theirs = results(x * 3 + 1, weight, bias, grad, False, training, **after)
    for a, e in zip((ours[0], *ours[-2:]), (theirs[0], *theirs[-2:]), strict=True):
        assert_same_bits(a, e)
    for a, e in zip(ours[1:-2], theirs[1:-2], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10 * e.abs().max().item())


@modes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_in_every_dtype_and_layout(
    dtypes: tuple[torch.dtype, torch.dtype], layout: str, training: bool, device: torch.device
) -> None:
    dtype, parameter_dtype = dtypes
    x = lay_out(torch.randn(6, 16, 5, 7).to(device, dtype), layout)
    grad = torch.randn(6, 16, 5, 7).to(device, dtype)
    weight, bias = (torch.randn(16).to(device, parameter_dtype) for _ in range(2))
    ours = results(x, weight, bias, grad, True, training, activation="leaky_relu")
    theirs = results(x, weight, bias, grad, False, training, activation="leaky_relu")
    for a, e in zip((ours[0], *ours[-2:]), (theirs[0], *theirs[-2:]), strict=True):
        assert_same_bits(a, e)
    # A deviation is recovered from the rounded output by a division by the weight, so its error can be several ulp.
    # The sums of 210 values average it.
    ulp = torch.finfo(dtype).eps
    for a, e in zip(ours[1:-2], theirs[1:-2], strict=True):
        torch.testing.assert_close(a, e, rtol=8 * ulp, atol=8 * ulp * e.abs().max().item())


@modes
@pytest.mark.parametrize("frozen", [[], [0], [1, 2]], ids=["all", "constant input", "constant parameters"])
@pytest.mark.parametrize("weights", [[0.7, -1.3, 0.5], [0.7, 0.0, 0.5]], ids=["recovered", "saved"])
def test_second_derivatives(weights: list[float], frozen: list[int], training: bool) -> None:
    x, weight, bias = torch.randn(4, 3, 2, dtype=torch.float64), torch.tensor(weights).double(), torch.randn(3).double()
    buffers = torch.zeros(3).double(), torch.ones(3).double()
    inputs = [t.requires_grad_(i not in frozen) for i, t in enumerate((x, weight, bias))]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # None of these values is near the kink of the leaky ReLU.
        return batch_norm(
            made(x),
            *buffers,
            weight,
            bias,
            training,
            momentum=0.0,
            activation="leaky_relu",
            activation_param=0.3,
            inplace=True,
        )

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@modes
def test_only_parameters_learn(training: bool, device: torch.device) -> None:
    x = torch.randn(5, 3, 4, device=device)
    layer = normfused.BatchNorm1d(3, inplace=True, device=device).train(training)
    values = x.clone()
    y = layer(values)
    assert y is values
    y.square().sum().backward()
    stock = nn.BatchNorm1d(3, device=device).train(training)
    stock(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, stock.weight.grad)
    torch.testing.assert_close(layer.bias.grad, stock.bias.grad)


@modes
def test_without_gradients(training: bool, device: torch.device) -> None:
    x = torch.randn(5, 3, 4, device=device)
    layer = normfused.BatchNormAct1d(3, inplace=True, activation="leaky_relu", device=device).train(training)
    stock = nn.BatchNorm1d(3, device=device).train(training)
    values, version = x.clone(), 0
    with torch.no_grad():
        assert layer(values) is values
    assert values._version > version
    torch.testing.assert_close(values, F.leaky_relu(stock(x)).detach())


def test_empty_batch(device: torch.device) -> None:
    layer = normfused.BatchNorm2d(3, inplace=True, device=device)
    x = torch.zeros(0, 3, 2, 2, device=device, requires_grad=True)
    layer(made(x)).sum().backward()
    assert x.grad is not None
    assert layer.running_mean.eq(0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_view_of_a_tensor_that_is_read_later(layout: str, device: torch.device) -> None:
    """Half of the channels are normalized in place, then all of them are read."""
    x = torch.randn(4, 6, 5, dtype=torch.float64, device=device)
    weight = torch.randn(3, dtype=torch.float64, device=device)

    def function(x: Tensor, inplace: bool) -> Tensor:
        whole = lay_out(made(x), layout)
        half = whole[:, 1:4]
        y = batch_norm(half, None, None, weight, training=True, inplace=inplace)
        return whole * 2 if inplace else torch.cat([whole[:, :1], y, whole[:, 4:]], 1) * 2

    gradients = []
    for inplace in (True, False):
        leaf = x.clone().requires_grad_()
        y = function(leaf, inplace)
        gradients.append((y, *torch.autograd.grad((y**3).sum(), leaf)))
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("kind", ["whole", "view"])
def test_graphs_are_freed(kind: str) -> None:
    class Tag:
        pass

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, tag: Tag) -> Tensor:
            ctx.tag = tag
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return grad * 2, None

    tag = Tag()
    alive = weakref.ref(tag)
    x = Marked.apply(torch.randn(4, 6, 5, requires_grad=True), tag)
    y = batch_norm(x if kind == "whole" else x[:, :3], None, None, training=True, inplace=True)
    del tag, x, y  # without a backward pass, which would free it too
    gc.collect()
    assert alive() is None


@pytest.mark.usefixtures("needs_extension")  # the fallback saves a copy
def test_later_changes_are_detected() -> None:
    layer = normfused.BatchNorm1d(3, inplace=True)
    y = layer(made(torch.randn(4, 3, requires_grad=True)))
    with torch.no_grad():
        y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_overwriting_a_saved_tensor_is_detected() -> None:
    layer = normfused.BatchNorm1d(3, inplace=True)
    x = made(torch.randn(4, 3, requires_grad=True))
    squares = x.square()
    y = layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y + squares).sum().backward()


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("small", [0, 3])
def test_tensors_saved_for_backward(small: int) -> None:
    """The output, which the next layer saves anyway, and the channels that cannot be recovered from it."""
    layer = normfused.BatchNormAct2d(16, activation="leaky_relu", inplace=True)
    with torch.no_grad():
        layer.weight[:small] = 0
        layer.bias.fill_(1)
    x = made(torch.randn(8, 16, 32, 32, requires_grad=True))
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    own = saved.pop(y.untyped_storage().data_ptr())
    assert own == y.nbytes
    others = sum(saved.values()) - small * y.nbytes // 16
    assert 0 <= others <= 64 * 16


def test_a_network_of_blocks(device: torch.device) -> None:
    """One tensor per block is saved, and the gradients equal those of the separate layers."""

    def stack(ours: bool) -> nn.Sequential:
        torch.manual_seed(3)
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 8), (8, 8), (8, 5)):
            layers.append(nn.Conv2d(inputs, outputs, 3, bias=False))
            if ours:
                layers.append(normfused.BatchNormAct2d(outputs, activation="leaky_relu", inplace=True))
            else:
                layers += [nn.BatchNorm2d(outputs), nn.LeakyReLU(inplace=True)]
        return nn.Sequential(*layers).to(device, torch.float64)

    x = torch.randn(4, 3, 12, 12, dtype=torch.float64, device=device)
    gradients, saved = [], []
    for ours in (True, False):
        model = stack(ours)
        model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        saved.append(bytes_saved_for_backward(model, x))
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
    if normfused.info()["extension"] == "loaded":
        assert saved[0] < 0.6 * saved[1]


def test_a_resnet_with_its_weights(device: torch.device) -> None:
    """Weights of a model with torch.nn's layers load, and give the same logits."""
    stock = resnet18().to(device, torch.float64).eval()
    with torch.no_grad():
        for p in [*stock.parameters(), *stock.buffers()]:
            if p.is_floating_point():
                p.uniform_(0.2, 0.6)
    ours = normfused.convert(resnet18().to(device, torch.float64), fuse=False).eval()
    for layer in ours.modules():
        if isinstance(layer, normfused.BatchNorm2d):
            layer.inplace = True
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, device=device)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    def run(inplace: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(3, 4, 3), normfused.BatchNorm1d(4, inplace=inplace), nn.Conv1d(4, 2, 3))
        x = torch.randn(5, 3, 9, requires_grad=True)
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        assert x.grad is not None
        return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]

    for a, e in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@modes
@pytest.mark.usefixtures("needs_extension")
def test_compiled_is_eager(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3), normfused.BatchNormAct1d(4, inplace=True, activation="leaky_relu"), nn.Conv1d(4, 2, 3)
    ).train(training)
    x = torch.randn(5, 3, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs, gradients = [], []
    for function in (model, compiled):
        model.zero_grad()
        y = function(x)
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert_same_bits(*outputs)
    for a, e in zip(*gradients, strict=True):  # eager mode computes from the output, compiled code from the input
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("needs_extension")
@modes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(layout: str, training: bool) -> None:
    ops = torch.ops.normfused
    x = lay_out(torch.randn(4, 3, 2, 5), layout)
    parameters, buffers = (torch.randn(3), torch.randn(3)), (torch.zeros(3), torch.ones(3))
    if training:
        arguments = (x, *parameters, *buffers, torch.tensor(1), 0.1, 1e-5, "leaky_relu", 0.1)
        torch.library.opcheck(ops.batch_norm_training_.default, arguments)
    else:
        torch.library.opcheck(ops.batch_norm_inference_.default, (x, *parameters, *buffers, 1e-5))
    statistics = torch.rand(2, 3, dtype=torch.float64) + 0.5
    torch.library.opcheck(
        ops.batch_norm_backward.default,
        (torch.randn(4, 3, 2, 5), x, parameters[0], statistics, training, [True, True, True, False], parameters[1]),
        {"activation": "leaky_relu", "activation_param": 0.1, "from_output": True},
    )


def test_torch_func_gradients() -> None:
    x, weight = torch.randn(6, 3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def loss(x: Tensor, inplace: bool) -> Tensor:
        return batch_norm(made(x), None, None, weight, training=True, inplace=inplace).pow(3).sum()

    torch.testing.assert_close(torch.func.grad(loss)(x, True), torch.func.grad(loss)(x, False))


def leaf() -> Tensor:
    return torch.randn(4, 3, 5, requires_grad=True)


def call(x: Tensor, **options: Any) -> Tensor:
    return batch_norm(x, None, None, training=True, inplace=True, **options)


NEEDS_INVERTIBLE = "needs an invertible activation, 'identity' or 'leaky_relu' with a positive activation_param, got "
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: call(leaf()), RuntimeError, "batch_norm: inplace=True cannot write over input, a leaf that requires grad"),
    (
        lambda: normfused.BatchNorm1d(3, inplace=True)(leaf()),
        RuntimeError,
        "BatchNorm1d: inplace=True cannot write over input, a leaf that requires grad",
    ),
    (
        lambda: call(leaf()[:, :2]),
        RuntimeError,
        "batch_norm: inplace=True cannot write over input, a view of a leaf that requires grad",
    ),
    (
        lambda: call(leaf().sigmoid()),
        RuntimeError,
        "batch_norm: inplace=True cannot write over input, which SigmoidBackward0 made and saves for backward; "
        "use inplace=False here",
    ),
    (
        lambda: call(leaf().relu()),
        RuntimeError,
        "batch_norm: inplace=True cannot write over input, which ReluBackward0 made and saves for backward; "
        "use inplace=False here",
    ),
    (
        lambda: call(torch.randn(1, 3, 5).expand(4, 3, 5)),
        RuntimeError,
        "batch_norm: inplace=True cannot write over input, whose elements share memory: shape (4, 3, 5), "
        "strides (0, 5, 1); clone it first",
    ),
    (
        lambda: call(torch.randn(4, 3, 5), residual=torch.randn(4, 3, 5)),
        ValueError,
        "batch_norm: inplace=True does not support residual",
    ),
    (
        lambda: call(torch.randn(4, 3, 5), mask=torch.ones(4, 5, dtype=torch.bool)),
        ValueError,
        "batch_norm: inplace=True does not support mask",
    ),
    (
        lambda: call(torch.randn(4, 3, 5), activation="relu"),
        ValueError,
        f"batch_norm: inplace=True {NEEDS_INVERTIBLE}'relu'",
    ),
    (
        lambda: call(torch.randn(4, 3, 5), activation="leaky_relu", activation_param=0.0),
        ValueError,
        f"batch_norm: inplace=True {NEEDS_INVERTIBLE}'leaky_relu' with 0.0",
    ),
    (
        lambda: normfused.BatchNormAct2d(3, activation="elu", inplace=True),
        ValueError,
        f"BatchNormAct2d: inplace=True {NEEDS_INVERTIBLE}'elu'",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as info:
        call()
    assert str(info.value) == message


def test_an_error_leaves_everything_unchanged() -> None:
    for x in (leaf(), leaf().sigmoid(), leaf()[:, :2]):
        values, version = x.detach().clone(), x._version
        mean, var, batches = torch.zeros(x.size(1)), torch.ones(x.size(1)), torch.tensor(0)
        with pytest.raises(RuntimeError):
            batch_norm(x, mean, var, training=True, num_batches_tracked=batches, inplace=True)
        with pytest.raises(ValueError, match="weight has 9 elements"):
            batch_norm(x.detach(), mean, var, torch.ones(9), training=True, num_batches_tracked=batches, inplace=True)
        assert_same_bits(x.detach(), values)
        assert x._version == version
        assert mean.eq(0).all()
        assert var.eq(1).all()
        assert batches == 0


def test_convert_does_not_change_inplace_layers() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), normfused.BatchNorm1d(4, inplace=True), nn.ReLU())
    x = torch.randn(8, 3, 16)
    expected, saved = model(x), bytes_saved_for_backward(model, x)
    torch.testing.assert_close(normfused.convert(model)(x), expected)
    assert normfused.conversion_report(model).fused == {}
    assert bytes_saved_for_backward(model, x) == saved
    assert "inplace=True" in repr(model[1])
    assert normfused.revert(model) is model
    assert type(model[1]) is normfused.BatchNorm1d
