"""Derivatives that no kernel computes: forward mode, torch.func, any order, and all of these compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import normfused
from normfused.activations import ACTIVATIONS
from normfused.functional import batch_norm, group_norm, layer_norm2d, local_response_norm, normalize, normalize_

Function = Callable[..., Any]
CHANNELS = 3
SHAPE = (4, CHANNELS, 2, 2)
MEAN, STD = [0.5, 0.25, -1.0], [2.0, 0.5, 3.0]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def buffers() -> tuple[Tensor, Tensor]:
    return double(CHANNELS), double(CHANNELS).abs() + 0.5


def plain_batch_norm(x: Tensor, statistics: tuple[Tensor, Tensor] | None, w: Tensor, b: Tensor) -> Tensor:
    """The definition, which torch differentiates in every mode."""
    dims, shape = (0, 2, 3), (1, -1, 1, 1)
    if statistics is None:
        mean, var = x.mean(dims), (x - x.mean(dims, keepdim=True)).square().mean(dims)
    else:
        mean, var = statistics
    return (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * w.view(shape) + b.view(shape)


def plain_group_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The definition for one group. torch's own backward of group norm has no forward mode."""
    deviation = x - x.mean((1, 2, 3), keepdim=True)
    invstd = (deviation.square().mean((1, 2, 3), keepdim=True) + 1e-5).rsqrt()
    return deviation * invstd * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)


def plain_layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The definition over channels."""
    deviation = x - x.mean(1, keepdim=True)
    invstd = (deviation.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    return deviation * invstd * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)


def of_batch_norm(training: bool, activation: str = "identity", residual: bool = False, inplace: bool = False) -> Any:
    """Our function, the definition, and arguments."""
    statistics = None if training else buffers()
    parameter = {"leaky_relu": 0.1, "elu": 1.3}.get(activation, 0.0)

    def ours(x: Tensor, w: Tensor, b: Tensor, *others: Tensor) -> Tensor:
        options: dict[str, Any] = {"activation": activation, "activation_param": parameter, "inplace": inplace}
        running = (None, None) if statistics is None else statistics
        x = x * 1 if inplace else x
        return batch_norm(x, *running, w, b, training, residual=others[0] if others else None, **options)

    def theirs(x: Tensor, w: Tensor, b: Tensor, *others: Tensor) -> Tensor:
        return ACTIVATIONS[activation](sum(others, plain_batch_norm(x, statistics, w, b)), parameter)

    values = [double(*SHAPE), double(CHANNELS) + 2, double(CHANNELS) * 0.1]
    return ours, theirs, [*values, double(*SHAPE)] if residual else values


def of_local_response_norm() -> Any:
    return (
        lambda x: local_response_norm(x, 3, alpha=1.0),
        lambda x: F.local_response_norm(x, 3, alpha=1.0),
        [double(*SHAPE)],
    )


def of_group_norm(activation: str = "identity") -> Any:
    return (
        lambda x, w, b, r: group_norm(x, 1, w, b, residual=r, activation=activation),
        lambda x, w, b, r: ACTIVATIONS[activation](plain_group_norm(x, w, b) + r, 0.0),
        [double(*SHAPE), double(CHANNELS) + 2, double(CHANNELS) * 0.1, double(*SHAPE)],
    )


def of_layer_norm() -> Any:
    return (
        lambda x, w, b, r: layer_norm2d(x, w, b, 1e-5, residual=r)[0],
        lambda x, w, b, r: plain_layer_norm(x + r, w, b),
        [double(*SHAPE), double(CHANNELS) + 2, double(CHANNELS) * 0.1, double(*SHAPE)],
    )


def of_standardize(inplace: bool = False) -> Any:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (MEAN, STD))
    if inplace:
        return lambda x: normalize_(x * 1, MEAN, STD).square(), lambda x: ((x - mean) / std) ** 2, [double(*SHAPE)]
    return (
        lambda x: normalize(x, MEAN, STD, scale=0.5).square(),
        lambda x: ((x * 0.5 - mean) / std) ** 2,
        [double(*SHAPE)],
    )


MODES = {"training": True, "eval": False}
FUNCTIONS: dict[str, Callable[[], Any]] = {
    **{f"batch_norm-{m}": lambda t=t: of_batch_norm(t) for m, t in MODES.items()},
    **{
        f"batch_norm-{m}-{activation}{'-residual' * residual}": lambda t=t, a=activation, r=residual: of_batch_norm(
            t, a, r
        )
        for m, t in MODES.items()
        for residual in (False, True)
        for activation in ("relu", "leaky_relu", "elu", "silu", "gelu_tanh")
    },
    **{
        f"batch_norm-{m}-inplace-{a}": lambda t=t, a=a: of_batch_norm(t, a, inplace=True)
        for m, t in MODES.items()
        for a in ("identity", "leaky_relu")
    },
    "local_response_norm": of_local_response_norm,
    **{f"group_norm-{activation}": lambda a=activation: of_group_norm(a) for activation in ("identity", "silu")},
    "layer_norm": of_layer_norm,
    "standardize": of_standardize,
    "standardize-inplace": lambda: of_standardize(inplace=True),
}
OUT_OF_PLACE = [name for name in FUNCTIONS if "inplace" not in name]
BASIC = ["batch_norm-training", "batch_norm-eval", "batch_norm-training-relu-residual", "local_response_norm"]
BASIC = [*BASIC, "standardize"]
every_function = pytest.mark.parametrize("name", FUNCTIONS)
basic_functions = pytest.mark.parametrize("name", BASIC)


def assert_close(ours: object, theirs: object) -> None:
    """Equal within 1e-9 of the maximum of each tensor."""
    leaves, expected = tree_leaves(ours), tree_leaves(theirs)
    for a, e in zip(leaves, expected, strict=True):
        scale = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9 * scale)


def tangents_of(values: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple((3 * v + 1).cos() for v in values)


# ---- transforms of the backward pass of an existing graph ------------------------------------------------------------


def graph(function: Function, values: list[Tensor]) -> tuple[Function, Tensor, Tensor]:
    """Build a graph. Returns the gradients as a function of the output's gradient, such a gradient, and its tangent."""
    leaves = [v.clone().requires_grad_() for v in values]
    y = function(*leaves)
    torch.manual_seed(8)
    return lambda g: torch.autograd.grad(y, leaves, g, retain_graph=True), double(*y.shape), double(*y.shape)


def dual_level(gradients: Function, g: Tensor, t: Tensor) -> Any:
    with forward_ad.dual_level():
        duals = [forward_ad.unpack_dual(r) for r in gradients(forward_ad.make_dual(g, t))]
        return [(d.primal.clone(), torch.zeros_like(d.primal) if d.tangent is None else d.tangent) for d in duals]


THROUGH: dict[str, Function] = {
    "dual_level": dual_level,
    "jvp": lambda gradients, g, t: torch.func.jvp(gradients, (g,), (t,)),
    "vjp": lambda gradients, g, t: torch.func.vjp(gradients, g)[1](gradients(t)),
    "vmap": lambda gradients, g, t: torch.func.vmap(gradients)(torch.stack([g, t])),
    "vmap of jvp": lambda gradients, g, t: torch.func.vmap(lambda t: torch.func.jvp(gradients, (g,), (t,)))(
        torch.stack([g, t])
    ),
}


@pytest.mark.parametrize("transform", THROUGH)
@every_function
def test_transform_over_an_earlier_graph(name: str, transform: str) -> None:
    ours, theirs, values = FUNCTIONS[name]()
    results = [THROUGH[transform](*graph(function, values)) for function in (ours, theirs)]
    assert_close(*results)


@every_function
def test_second_derivatives_over_an_earlier_graph(name: str) -> None:
    """The tangent enters a backward pass with create_graph=True, whose result is then differentiated again."""

    def second(function: Function, values: list[Tensor]) -> Any:
        leaves = [v.clone().requires_grad_() for v in values]
        y = function(*leaves)
        torch.manual_seed(8)
        g, t = double(*y.shape), double(*y.shape)
        with forward_ad.dual_level():
            first = torch.autograd.grad(y, leaves, forward_ad.make_dual(g, t), create_graph=True)
            total = sum((f**3).sum() for f in first)
            grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
            duals = [forward_ad.unpack_dual(d) for d in grads]
            return [(d.primal, torch.zeros_like(d.primal) if d.tangent is None else d.tangent) for d in duals]

    ours, theirs, values = FUNCTIONS[name]()
    assert_close(second(ours, values), second(theirs, values))


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_functional_jacobian(name: str, strategy: str) -> None:
    ours, theirs, values = FUNCTIONS[name]()
    assert_close(
        *(
            torch.autograd.functional.jacobian(f, tuple(values), vectorize=True, strategy=strategy)
            for f in (ours, theirs)
        )
    )


# ---- torch.func, eager and compiled ----------------------------------------------------------------------------------


def cubed(function: Function) -> Function:
    return lambda *values: (function(*values) ** 3).sum()


TRANSFORMS: dict[str, Function] = {
    "jvp": lambda f, v: torch.func.jvp(f, tuple(v), tangents_of(v)),
    "vjp": lambda f, v: torch.func.vjp(f, *v)[1](torch.linspace(-1, 2, 48).double().view(SHAPE)),
    "grad": lambda f, v: torch.func.grad(cubed(f), argnums=tuple(range(len(v))))(*v),
    "jacfwd": lambda f, v: torch.func.jacfwd(f)(*v),
    "jacrev": lambda f, v: torch.func.jacrev(f)(*v),
    "hessian": lambda f, v: torch.func.hessian(cubed(f))(*v),
    "vmap": lambda f, v: torch.func.vmap(f)(*(torch.stack([t, 2 * t, t + 1]) for t in v)),
    "vmap of grad": lambda f, v: torch.func.vmap(torch.func.grad(cubed(f)))(*(torch.stack([t, t + 1]) for t in v)),
    "grad of vmap": lambda f, v: torch.func.grad(cubed(torch.func.vmap(f)))(*(torch.stack([t, t + 1]) for t in v)),
    "vmap of vmap": lambda f, v: torch.func.vmap(torch.func.vmap(f))(
        *(torch.stack([t, t + 1, 2 * t, t]).view(2, 2, *t.shape) for t in v)
    ),
    "vjp of vjp": lambda f, v: torch.func.vjp(torch.func.grad(cubed(f)), *v)[1](v[0]),
    "jvp of vjp": lambda f, v: torch.func.jvp(torch.func.grad(cubed(f)), tuple(v), tangents_of(v)),
    "grad of jvp": lambda f, v: torch.func.grad(lambda *v: torch.func.jvp(f, v, tangents_of(list(v)))[1].sum())(*v),
    "third derivative": lambda f, v: torch.func.grad(
        lambda x: (torch.func.grad(lambda x: (torch.func.grad(cubed(f))(x, *v[1:]) ** 2).sum())(x) ** 2).sum()
    )(v[0]),
    "linearize": lambda f, v: torch.func.linearize(f, *v)[1](*tangents_of(v)),
    "functionalize": lambda f, v: torch.func.functionalize(f)(*v),
    "functionalize of grad": lambda f, v: torch.func.functionalize(torch.func.grad(cubed(f)))(*v),
    "functionalize of vmap": lambda f, v: torch.func.functionalize(torch.func.vmap(f))(*(t.unsqueeze(0) for t in v)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@every_function
def test_transform(name: str, transform: str) -> None:
    if transform == "linearize" and "inplace" in name:
        pytest.skip("torch.func.linearize traces no operations in place, not even torch's")
    ours, theirs, values = FUNCTIONS[name]()
    assert_close(*(TRANSFORMS[transform](f, values) for f in (ours, theirs)))


@pytest.mark.exhaustive
@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("transform", ["jvp", "vjp", "grad", "jacfwd", "jacrev", "hessian", "vmap", "vmap of grad"])
@basic_functions
def test_compiled_transform(name: str, transform: str) -> None:
    torch._dynamo.reset()
    ours, theirs, values = FUNCTIONS[name]()
    compiled = torch.compile(lambda *v: TRANSFORMS[transform](ours, v), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*values), TRANSFORMS[transform](theirs, values))


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("transform", ["jvp", "grad"])
@pytest.mark.parametrize("name", ["batch_norm-training", "local_response_norm"])
def test_transform_compiled_by_inductor(name: str, transform: str) -> None:
    torch._dynamo.reset()
    ours, theirs, values = FUNCTIONS[name]()
    compiled = torch.compile(lambda *v: TRANSFORMS[transform](ours, v), fullgraph=True)
    assert_close(compiled(*values), TRANSFORMS[transform](theirs, values))


@every_function
def test_third_derivative(name: str) -> None:
    results = []
    ours, theirs, values = FUNCTIONS[name]()
    for function in (ours, theirs):
        leaves = [v.clone().requires_grad_() for v in values]
        y = function(*leaves)
        for _ in range(3):
            found = torch.autograd.grad((y**3).sum(), leaves, create_graph=True, allow_unused=True)
            y = found[0]
        results.append([torch.zeros_like(v) if f is None else f for f, v in zip(found, values, strict=True)])
    assert_close(*results)


# ---- running statistics ----------------------------------------------------------------------------------------------


def updates(statistics: list[Tensor], training: bool, function: Function) -> Any:
    return lambda x: function(x, *statistics, None, None, training)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_have_no_tangent(momentum: float | None) -> None:
    layer, other = (library.BatchNorm2d(CHANNELS, momentum=momentum).double() for library in (normfused, nn))
    x, t = double(*SHAPE), double(*SHAPE)
    other(x)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t)))
        assert y.tangent is not None
        for buffer in layer.buffers():
            assert forward_ad.unpack_dual(buffer).tangent is None
            assert not buffer.requires_grad
    assert_close(layer.state_dict(), other.state_dict())
    # A tangent of the first forward pass must not affect the second.
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(layer.eval()(forward_ad.make_dual(x, torch.zeros_like(t)))).tangent.eq(0).all()


@pytest.mark.parametrize("transform", ["jvp", "vjp", "grad", "jacfwd", "jacrev", "linearize", "functionalize"])
def test_running_statistics_under_transforms(transform: str) -> None:
    x = double(*SHAPE)
    results = []
    for function in (batch_norm, F.batch_norm):
        statistics = [torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()]
        results.append((TRANSFORMS[transform](updates(statistics, True, function), [x]), statistics))
        assert not any(s.requires_grad for s in statistics)
    assert results[1][1][0].abs().max() > 0
    assert_close(*results)


def test_running_statistics_with_tangents_are_refused() -> None:
    mean, var = buffers()
    for training in (True, False):
        for statistics in ((0, mean, var), (1, mean, var)):
            which, *pair = statistics
            with forward_ad.dual_level():
                pair[which] = forward_ad.make_dual(pair[which], torch.ones_like(mean))
                with pytest.raises(ValueError, match="has a tangent, but running statistics are not differentiated"):
                    batch_norm(double(*SHAPE), *pair, training=training)


WAY_OUT = r"track_running_stats=False.*replace_all_batch_norm_modules_.*without running statistics.*eval mode"


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"nonfinite": "skip"}, {"inplace": True}], ids=str)
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: torch.func.grad(cubed(f))], ids=["vmap", "vmap of grad"])
def test_vmap_over_a_tracked_layer_is_refused(wrap: Function, options: dict[str, Any]) -> None:
    layer = normfused.BatchNorm2d(CHANNELS, **options).double()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises(NotImplementedError, match=WAY_OUT):
        torch.func.vmap(wrap(lambda x: layer(x * 1)))(double(2, *SHAPE))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name
    untracked = normfused.BatchNorm2d(CHANNELS, track_running_stats=False).double()
    theirs = nn.BatchNorm2d(CHANNELS, track_running_stats=False).double()
    x = double(2, *SHAPE)
    assert_close(torch.func.vmap(untracked)(x), torch.func.vmap(theirs)(x))
    torch.func.replace_all_batch_norm_modules_(layer)
    assert torch.func.vmap(lambda x: layer(x * 1))(x).shape == x.shape


def test_vmap_over_parameters_updates_once() -> None:
    weights, x = double(5, CHANNELS), double(*SHAPE)
    results = []
    for function in (batch_norm, F.batch_norm):
        statistics = [torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()]
        y = torch.func.vmap(lambda w, f=function, s=statistics: f(x, *s, w, None, True))(weights)
        results.append((y, statistics))
    assert_close(*results)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("training", MODES.values(), ids=MODES)
def test_ensemble(training: bool, options: dict[str, Any]) -> None:
    """vmap over layers batches their buffers too. Each sample updates its own buffers."""
    layers = [normfused.BatchNorm2d(CHANNELS, **options).double().train(training) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.running_mean)
        layer.running_var.uniform_(0.5, 2)
    parameters, state = torch.func.stack_module_state(layers)
    xs = double(3, *SHAPE)
    if "nonfinite" in options:
        xs[1, 0, 1, 0, 0] = torch.inf

    def call(parameters: dict[str, Tensor], state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layers[0], (parameters, state), (x,))

    y = torch.func.vmap(call)(parameters, state, xs)
    assert_close(y.nan_to_num(), torch.stack([layer(x) for layer, x in zip(layers, xs, strict=True)]).nan_to_num())
    for name, stacked in state.items():
        assert_close(stacked, torch.stack([dict(layer.named_buffers())[name] for layer in layers]))


# ---- the operators themselves ----------------------------------------------------------------------------------------

ops = torch.ops.normfused
REFUSED = "refused"


def operator_calls() -> dict[str, Any]:
    """For each operator with floating input: a function of its differentiable tensors, the tensors, the definition."""
    statistics = buffers()
    x, w, b, r, g = double(*SHAPE), double(CHANNELS), double(CHANNELS), double(*SHAPE), double(*SHAPE)
    of_x = torch.stack([x.mean((0, 2, 3)), 1 / (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()])
    zeros = torch.zeros(CHANNELS).double()

    def gradients(g: Tensor, x: Tensor, w: Tensor) -> Any:
        _, pullback = torch.func.vjp(lambda x, w, b: plain_batch_norm(x, None, w, b), x, w, zeros)
        return pullback(g)

    groups = x.view(SHAPE[0], 1, -1)
    of_groups = torch.stack([groups.mean(-1), 1 / (groups.var(-1, correction=0) + 1e-5).sqrt()])

    def group_gradients(g: Tensor, x: Tensor, w: Tensor) -> Any:
        return torch.func.vjp(lambda x, w, b: plain_group_norm(x, w, b), x, w, zeros)[1](g)

    of_layers = torch.stack([x.mean(1, True), 1 / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()])

    def layer_gradients(g: Tensor, x: Tensor, w: Tensor, r: Tensor) -> Any:
        of_x, *others = torch.func.vjp(lambda x, w, b: plain_layer_norm(x, w, b), x, w, zeros)[1](g)
        return of_x + r, *others

    return {
        "layer_norm": (
            lambda x, w, b, r: ops.layer_norm(x, 1, 1, w, b, 1e-5, r)[:2],
            (x, w, b, r),
            lambda x, w, b, r: (plain_layer_norm(x + r, w, b), x + r),
        ),
        "layer_norm_backward": (
            lambda g, x, w, r: ops.layer_norm_backward(g, x, 1, 1, w, zeros, of_layers, [True] * 3, r),
            (g, x, w, r),
            layer_gradients,
        ),
        "group_norm": (
            lambda x, w, b, r: ops.group_norm(x, 1, w, b, 1e-5, r)[0],
            (x, w, b, r),
            lambda x, w, b, r: plain_group_norm(x, w, b) + r,
        ),
        "group_norm_backward": (
            lambda g, x, w: ops.group_norm_backward(g, x, 1, w, of_groups, [True, True, True, False])[:3],
            (g, x, w),
            group_gradients,
        ),
        "batch_norm_training": (
            lambda x, w, b, r: ops.batch_norm_training(x, w, b, None, None, None, 0.1, 1e-5, r)[0],
            (x, w, b, r),
            lambda x, w, b, r: plain_batch_norm(x, None, w, b) + r,
        ),
        "batch_norm_inference": (
            lambda x, w, b, r: ops.batch_norm_inference(x, w, b, *statistics, 1e-5, r)[0],
            (x, w, b, r),
            lambda x, w, b, r: plain_batch_norm(x, statistics, w, b) + r,
        ),
        "batch_norm_backward": (
            lambda g, x, w: ops.batch_norm_backward(g, x, w, of_x, True, [True, True, True, False])[:3],
            (g, x, w),
            gradients,
        ),
        "local_response_norm": (
            lambda x: ops.local_response_norm(x, 3, 1.0, 0.75, 1.0),
            (x,),
            lambda x: F.local_response_norm(x, 3, 1.0),
        ),
        "local_response_norm_backward": (
            lambda g, x: ops.local_response_norm_backward(g, x, 3, 1.0, 0.75, 1.0),
            (g, x),
            lambda g, x: torch.func.vjp(lambda x: F.local_response_norm(x, 3, 1.0), x)[1](g)[0],
        ),
        "standardize": (lambda x: ops.standardize(x, MEAN, STD), (x,), lambda x: of_standardize_plain(x)),
        "batch_norm_training_": (
            lambda x: ops.batch_norm_training_(x, None, None, None, None, None, 0.1, 1e-5),
            (x,),
            REFUSED,
        ),
        "batch_norm_inference_": (lambda x: ops.batch_norm_inference_(x, None, None, *statistics, 1e-5), (x,), REFUSED),
        "batch_norm_by_statistics": (
            lambda x, s: ops.batch_norm_by_statistics(x, s, None, None)[0],
            (x, of_x),
            REFUSED,
        ),
        "batch_norm_backward from the output": (
            lambda g, x: ops.batch_norm_backward(g, x, None, of_x, True, [True, False, False, False], from_output=True),
            (g, x),
            REFUSED,
        ),
        "standardize_": (lambda x: ops.standardize_(x, MEAN, STD), (x,), REFUSED),
        "standardize_out": (lambda x: ops.standardize_out(x, MEAN, STD, 1.0, torch.empty_like(x)), (x,), REFUSED),
        "channel_moments": (ops.channel_moments, (x,), REFUSED),
        "channel_sums": (ops.channel_sums, (x,), REFUSED),
        "pack_moments": (lambda x: ops.pack_moments(x, 1e-5), (x,), REFUSED),
    }


def of_standardize_plain(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


OPERATORS = [] if normfused.info()["extension"] != "loaded" else list(operator_calls())


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_keeps_tangents_or_refuses(name: str) -> None:
    call, values, definition = operator_calls()[name]
    tangents = tangents_of(list(values))
    for which in range(len(values)):  # the tangent of each single tensor must be propagated
        with forward_ad.dual_level():
            given = [v.clone() for v in values]
            given[which] = forward_ad.make_dual(given[which], tangents[which])
            if definition == REFUSED:
                with pytest.raises(NotImplementedError, match=r"derivative|forward AD"):
                    call(*given)
                assert all(torch.equal(g, v) for g, v in zip(given, values, strict=True))
                continue
            results = call(*given), definition(*given)
            for a, e in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
                a, e = (forward_ad.unpack_dual(t) for t in (a, e))
                assert_close(a.primal, e.primal)
                assert_close(*(torch.zeros_like(d.primal) if d.tangent is None else d.tangent for d in (a, e)))


def test_every_operator_is_listed() -> None:
    if OPERATORS:
        registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("normfused::")}
        names = {f"normfused::{name.split()[0]}" for name in OPERATORS}
        # merge_ranks and integer_sums have integer input; the result of outside_backward is a flag.
        others = ("merge_ranks", "integer_sums", "outside_backward")
        assert registered - names == {f"normfused::{name}" for name in others}


@pytest.mark.usefixtures("needs_extension")
def test_composites_check_their_arguments() -> None:
    """Composites refuse the shapes that kernels refuse, instead of broadcasting them."""
    x, one = double(*SHAPE), double(1)
    statistics = torch.ones(2, CHANNELS).double()
    backward = (double(*SHAPE), x.requires_grad_(), one, statistics, True, [True, True, True, False])
    calls: list[Callable[[], Any]] = [
        lambda: torch.func.vmap(lambda x: batch_norm(x, None, None, one, training=True))(double(2, *SHAPE)),
        lambda: torch.func.vmap(lambda x: batch_norm(x, one, one, training=False))(double(2, *SHAPE)),
        lambda: torch.func.vmap(lambda r: batch_norm(x, None, None, training=True, residual=r))(
            double(2, *SHAPE)[..., :1]
        ),
        lambda: torch.func.vmap(lambda x: batch_norm(x, None, None, training=True))(double(2, 1, CHANNELS)),
        lambda: ops.batch_norm_backward(*backward),
        lambda: torch.func.vmap(lambda g: ops.batch_norm_backward(g, *backward[1:]))(double(2, *SHAPE)),
        lambda: ops.local_response_norm_backward(double(*SHAPE)[..., :1], x, 3, 1.0, 0.75, 1.0),
        lambda: torch.func.vmap(lambda x: ops.local_response_norm(x, 0, 1.0, 0.75, 1.0))(double(2, *SHAPE)),
        lambda: torch.func.vmap(lambda x: ops.standardize(x, [1.0], [1.0]))(double(2, *SHAPE)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"shape|channels|value per channel|size|elements"):
            call()
