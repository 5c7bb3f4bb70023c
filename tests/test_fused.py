"""Activation and residual in the same pass, and the options of the layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from common import LAYOUTS, assert_same_bits, dtype_id, lay_out
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import normfused
from normfused import reference
from normfused.activations import ACTIVATION_PARAMS
from normfused.functional import batch_norm

BLOCKS = {
    None: lambda z: z,
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
residuals = pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
activations = pytest.mark.parametrize("activation", list(BLOCKS))


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def results(
    function: Callable[..., Tensor], x: Tensor, residual: Tensor | None, grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Output, all gradients and the running statistics of one pass."""
    torch.manual_seed(3)
    channels = x.size(1)
    x = x.detach().requires_grad_()
    weight, bias = (torch.randn(channels).to(x.device, dtype).requires_grad_() for _ in range(2))
    buffers = torch.randn(channels).to(x.device, dtype), (torch.rand(channels) + 0.5).to(x.device, dtype)
    inputs = [x, weight, bias]
    if residual is not None:
        residual = residual.detach().requires_grad_()
        inputs.append(residual)
    y = function(x, residual, *buffers, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad), *buffers]


@modes
@residuals
@activations
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (8, 64, 9), (40, 33), (2, 70, 7, 7), (5, 1, 3, 3, 3)], ids=str)
def test_equals_the_separate_layers(
    shape: tuple[int, ...], activation: str | None, with_residual: bool, training: bool, device: torch.device
) -> None:
    x, residual, grad = (double(*shape).to(device) for _ in range(3))

    def ours(x, residual, *rest):
        return batch_norm(x, *rest, training, residual=residual, activation=activation)

    def theirs(x, residual, *rest):
        z = F.batch_norm(x, *rest, training)
        return BLOCKS[activation](z if residual is None else z + residual)

    arguments = (x, residual if with_residual else None, grad, torch.float64)
    for a, e in zip(results(ours, *arguments), results(theirs, *arguments), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@modes
@residuals
@activations
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
def test_in_every_dtype_and_layout(
    dtype: torch.dtype, layout: str, activation: str | None, with_residual: bool, training: bool, device: torch.device
) -> None:
    """Compared with float64 arithmetic on the same values. The tolerance covers the rounding of results and sums."""
    shape = (6, 5, 7, 3)
    x, residual, grad = (lay_out(torch.randn(shape).to(device, dtype), layout) for _ in range(3))

    def with_function(function):
        name = activation or "identity"
        parameter = ACTIVATION_PARAMS.get(name, 0.0)
        return lambda x, residual, *rest: function(
            x, *rest, training, residual=residual, activation=name, activation_param=parameter
        )

    arguments = (x, residual if with_residual else None, grad, torch.float32)
    ours, theirs = (
        results(with_function(batch_norm), *arguments),
        results(with_function(reference.batch_norm), *arguments),
    )
    assert [t.stride() for t in ours[:2]] == [t.stride() for t in theirs[:2]]
    for a, e in zip(ours, theirs, strict=True):
        assert a.dtype == e.dtype
        tolerance = torch.finfo(a.dtype).eps + 2e-6
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * e.abs().max().item() + 1e-6)


@modes
@residuals
@activations
def test_second_derivatives(activation: str | None, with_residual: bool, training: bool) -> None:
    x, w, b = (double(*s).requires_grad_() for s in ((3, 2, 3), (2,), (2,)))
    # Away from the kinks of the piecewise activations.
    residual = (torch.tensor([-2.0, 1.7]).double().view(1, 2, 1) + 0.1 * double(3, 2, 3)).requires_grad_()
    statistics = (None, None) if training else (double(2), double(2).abs() + 0.5)

    def function(x, w, b, *residual):
        scaled = w * 0.1 if residual else w
        return batch_norm(
            x, *statistics, scaled, b * 0.1, training, residual=residual[0] if residual else None, activation=activation
        )

    inputs = (x, w, b, residual) if with_residual else (x, w, b)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("activation", ["elu", "hardswish", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh"])
def test_activations_of_huge_values(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    """Their limits: no intermediate result overflows, for any magnitude that the dtype has."""
    magnitudes = torch.tensor([1e9, 1e19, 1e30, float(torch.finfo(dtype).max)], dtype=dtype, device=device)
    x = torch.cat((magnitudes, -magnitudes)).view(-1, 1).requires_grad_()
    mean, var = torch.zeros(1, dtype=dtype, device=device), torch.ones(1, dtype=dtype, device=device)
    y = batch_norm(x, mean, var, eps=0.0, activation=activation)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    bounded = {"sigmoid": (1.0, 0.0), "tanh": (1.0, -1.0)}
    upper, lower = bounded.get(activation, (None, -1.0 if activation == "elu" else 0.0))
    positive, negative = y.detach()[:4, 0], y.detach()[4:, 0]
    assert torch.equal(positive, magnitudes if upper is None else torch.full_like(positive, upper))
    assert torch.equal(negative, torch.full_like(negative, lower))
    slope = torch.full_like(magnitudes, 0.0 if activation in bounded else 1.0)
    assert torch.equal(gradient[:, 0], torch.cat((slope, torch.zeros_like(slope))))


def saved_bytes(function: Callable[[], Tensor]) -> tuple[int, set[int]]:
    """The number of bytes that autograd saves for backward, and the addresses of their storages."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(saved.values()), set(saved)


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_bytes_saved_for_backward(dtype: torch.dtype) -> None:
    shape, channels = (8, 16, 14, 14), 16
    x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    size, few = x.numel() * x.element_size(), 64 * channels
    layer = normfused.BatchNormAct2d(channels, activation="relu")
    relu, _ = saved_bytes(lambda: layer(x))
    assert size <= relu <= size + few
    added, where = saved_bytes(lambda: layer(x, residual))
    assert size + x.numel() // 8 <= added <= size + x.numel() // 8 + few
    assert residual.untyped_storage().data_ptr() not in where
    layer.activation = "silu"
    added, where = saved_bytes(lambda: layer(x, residual))
    assert residual.untyped_storage().data_ptr() in where
    assert added <= 2 * size + few


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize(("activation", "bits"), [(None, 0), ("relu", 1)])
def test_a_frozen_layer_saves_no_activation(activation: str | None, bits: int) -> None:
    x = torch.randn(8, 16, 14, 14, requires_grad=True)
    layer = normfused.BatchNormAct2d(16, activation=activation).freeze().requires_grad_(False)
    saved, _ = saved_bytes(lambda: layer(x))
    assert saved <= bits * x.numel() // 8 + 64 * 16
    strided = lay_out(torch.randn(8, 16, 14, 14), "channels_last")
    y = layer(x)
    (grad,) = torch.autograd.grad(y, x, strided)
    stock = nn.BatchNorm2d(16).eval()
    want = torch.autograd.grad(BLOCKS[activation](stock(x)), x, strided)[0]
    torch.testing.assert_close(grad, want)
    assert grad.stride() == x.stride()


def test_a_frozen_layer_stays_frozen() -> None:
    model = nn.Sequential(normfused.BatchNorm1d(3), nn.Linear(3, 3))
    layer = model[0]
    layer.freeze()
    model.train()
    assert not layer.training
    assert model[1].training
    assert "frozen=True" in repr(layer)
    before = copy.deepcopy(layer.state_dict())
    model(torch.randn(5, 3))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert "frozen" not in repr(layer.unfreeze())
    assert layer.training
    with pytest.raises(ValueError, match="BatchNorm1d: there are no running statistics to freeze"):
        normfused.BatchNorm1d(3, track_running_stats=False).freeze()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_evaluation_equals_training_without_correction(momentum: float | None, device: torch.device) -> None:
    layer = normfused.BatchNorm2d(3, momentum=1.0 if momentum else None, running_var_correction=0).to(device)
    x = torch.randn(4, 3, 5, 5, device=device)
    trained = layer(x)
    torch.testing.assert_close(layer.eval()(x), trained, rtol=1e-6, atol=1e-6)
    stock = nn.BatchNorm2d(3, momentum=layer.momentum).to(device)
    stock(x)
    assert not torch.allclose(stock.running_var, layer.running_var, rtol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_nonfinite_batch_is_skipped_per_channel(bad: float, layout: str, device: torch.device) -> None:
    layer = normfused.BatchNorm2d(4, nonfinite="skip").to(device)
    clean = normfused.BatchNorm2d(4).to(device)
    x = torch.randn(3, 4, 5, 5, device=device)
    layer(x)
    clean(x)
    before = layer.running_mean.clone(), layer.running_var.clone()
    second = torch.randn(3, 4, 5, 5, device=device)
    clean(second)
    broken = lay_out(second, layout).clone(memory_format=torch.preserve_format)
    broken[1, 2, 3, 0] = bad
    layer(broken)
    for ours, old, theirs in zip(
        (layer.running_mean, layer.running_var), before, (clean.running_mean, clean.running_var), strict=True
    ):
        assert_same_bits(ours[2], old[2])
        torch.testing.assert_close(ours[[0, 1, 3]], theirs[[0, 1, 3]])
    assert layer.nonfinite_batches.tolist() == [0, 0, 1, 0]
    assert layer.num_batches_tracked.item() == 2
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(4).state_dict())
    propagating = normfused.BatchNorm2d(4).to(device)
    propagating(broken)
    assert not propagating.running_var[2].isfinite()


def test_no_stats_update() -> None:
    layer = normfused.BatchNorm1d(3)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(6, 3)
    with normfused.no_stats_update():
        y = layer(x)
        with normfused.no_stats_update():
            layer(x)
        layer(x)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert_same_bits(layer(x), y)
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_updates_once(reentrant: bool) -> None:
    layer, plain = normfused.BatchNormAct2d(3, activation="relu"), normfused.BatchNormAct2d(3, activation="relu")
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    got, x.grad = x.grad, None
    plain(x).square().sum().backward()
    assert_same_bits(got, x.grad)
    for a, e in zip(layer.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, e)
    assert layer.num_batches_tracked.item() == 1


X = torch.randn(4, 3, 5, 5)
BAD = [
    (
        lambda: normfused.BatchNorm2d(3)(X, X[:, :, :4]),
        ValueError,
        "batch_norm: residual must have input's shape (4, 3, 5, 5), got (4, 3, 4, 5)",
    ),
    (
        lambda: normfused.BatchNorm2d(3)(X, X.long()),
        TypeError,
        "batch_norm: residual must be float32, float64, float16 or bfloat16, got torch.int64",
    ),
    (
        lambda: normfused.BatchNorm2d(3)(X, X.to("meta")),
        ValueError,
        "batch_norm: residual is on meta, but input is on cpu",
    ),
    (lambda: normfused.BatchNorm2d(3)(X, 1.0), TypeError, "batch_norm: residual must be a tensor or None, got float"),
    (
        lambda: normfused.BatchNormAct2d(3, activation="swish"),
        ValueError,
        "BatchNormAct2d: unknown activation 'swish': must be one of identity, relu, relu6, leaky_relu, elu, "
        "hardswish, sigmoid, tanh, silu, gelu, gelu_tanh",
    ),
    (
        lambda: batch_norm(X, None, None, training=True, activation="ReLU"),
        ValueError,
        "batch_norm: unknown activation 'ReLU': must be one of identity, relu, relu6, leaky_relu, elu, "
        "hardswish, sigmoid, tanh, silu, gelu, gelu_tanh",
    ),
    (
        lambda: normfused.BatchNormAct2d(3, activation="relu", activation_param=0.1),
        ValueError,
        "BatchNormAct2d: activation_param applies to leaky_relu and elu only, got it for 'relu'",
    ),
    (
        lambda: normfused.BatchNormAct2d(3, activation="elu", activation_param=float("nan")),
        ValueError,
        "BatchNormAct2d: activation_param must be a finite number, got nan",
    ),
    (
        lambda: normfused.BatchNorm2d(3, running_var_correction=2),
        ValueError,
        "BatchNorm2d: running_var_correction must be 0 or 1, got 2",
    ),
    (
        lambda: batch_norm(X, None, None, training=True, running_var_correction=-1),
        ValueError,
        "batch_norm: running_var_correction must be 0 or 1, got -1",
    ),
    (
        lambda: normfused.BatchNorm2d(3, nonfinite="drop"),
        ValueError,
        "BatchNorm2d: nonfinite must be 'propagate' or 'skip', got 'drop'",
    ),
    (
        lambda: normfused.BatchNorm2d(3, nonfinite="skip", track_running_stats=False),
        ValueError,
        "BatchNorm2d: nonfinite='skip' needs track_running_stats=True",
    ),
    (
        lambda: batch_norm(X, torch.zeros(3), torch.ones(3), training=True, nonfinite_batches=torch.zeros(3)),
        ValueError,
        "batch_norm: nonfinite_batches must be an int64 tensor of shape (3,) on cpu, "
        "got torch.float32 of shape (3,) on cpu",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message[:60] for _, _, message in BAD])
def test_bad_arguments(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message


@pytest.mark.usefixtures("needs_extension")
@modes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    ("activation", "with_residual"), [("relu", True), ("silu", True), ("leaky_relu", False), ("identity", True)]
)
def test_opcheck(activation: str, with_residual: bool, layout: str, training: bool) -> None:
    x, r = (lay_out(torch.randn(4, 3, 2, 5), layout).requires_grad_() for _ in range(2))
    parameters = [torch.randn(3).requires_grad_() for _ in range(2)]
    buffers = torch.zeros(3), torch.ones(3)
    after = {"residual": r if with_residual else None, "activation": activation, "activation_param": 0.2}
    ops = torch.ops.normfused
    if training:
        arguments = (x, *parameters, *buffers, torch.tensor(1), 0.1, 1e-5)
        skipped = torch.zeros(3, dtype=torch.int64)
        torch.library.opcheck(
            ops.batch_norm_training.default, arguments, {**after, "nonfinite_batches": skipped, "correction": 0}
        )
    else:
        torch.library.opcheck(ops.batch_norm_inference.default, (x, *parameters, *buffers, 1e-5), after)


class Block(nn.Module):
    def __init__(self, activation: str) -> None:
        super().__init__()
        self.first = normfused.BatchNormAct2d(6, activation=activation, nonfinite="skip")
        self.second = normfused.BatchNormAct2d(6, activation="relu", running_var_correction=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), x)


@pytest.mark.usefixtures("needs_extension")
@modes
@pytest.mark.parametrize("activation", ["relu", "gelu", "hardswish"])
def test_compiled_is_eager(activation: str, training: bool) -> None:
    torch._dynamo.reset()
    eager = Block(activation).train(training)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in [(4, 6, 5, 7), (3, 6, 8, 4)]:
        x, g = torch.randn(shape), torch.randn(shape)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [eager(inputs[0]), compiled(inputs[1])]
        for y in outputs:
            y.backward(g)
        assert_same_bits(*outputs)
        assert_same_bits(inputs[0].grad, inputs[1].grad)
    for a, e in zip([*model.parameters(), *model.buffers()], [*eager.parameters(), *eager.buffers()], strict=True):
        assert_same_bits(a, e)
        if a.requires_grad:
            assert_same_bits(a.grad, e.grad)
