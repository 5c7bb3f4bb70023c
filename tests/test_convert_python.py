"""A converted model does what its Python code says: contexts, branches, state, hooks, children, outputs.

Each case is the smallest model of one kind. It is run as it is and converted, for the same steps, and everything that
can be seen of it must be equal: outputs, gradients, parameters, buffers, attributes.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import normfused

pytestmark = pytest.mark.usefixtures("needs_extension", "_fresh_compiler")


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def block(inputs: int = 3, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """A stem and a head, and a forward by function."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.head = block(), block()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return flat([getattr(value, f.name) for f in dataclasses.fields(value)])
    if isinstance(value, dict):
        return flat([*value.values()])
    return [t for item in value for t in flat(item)] if isinstance(value, (list, tuple)) else []


def seed() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002  # users call it


def run(model: nn.Module, shapes: list[tuple[int, ...]], dtype: torch.dtype, backward: bool) -> list[Any]:
    """All that can be seen of a few calls."""
    seed()
    seen: list[Any] = []
    for shape in shapes:
        x = (torch.randn(shape, dtype=torch.float64) + 0.3).to(dtype).requires_grad_(backward)
        y = model(x)
        seen.append([t.detach().clone() for t in flat(y)])
        seen.append(type(y).__name__)
        if backward and any(t.requires_grad for t in flat(y)):
            model.zero_grad()
            sum((t.double() ** 3).sum() for t in flat(y) if t.requires_grad).backward()
            seen.append([None if t.grad is None else t.grad.clone() for t in [x, *model.parameters()]])
    seen.append([t.detach().clone() for t in [*model.parameters(), *model.buffers()]])
    plain = {k: v for m in model.modules() for k, v in vars(m).items() if isinstance(v, (int, float, str))}
    return [*seen, plain]


def assert_same(
    stock: nn.Module,
    shapes: list[tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float64,
    backward: bool = True,
    fused: int | None = None,
    converted: nn.Module | None = None,
) -> nn.Module:
    """Run `stock` and its conversion; return that."""
    stock = stock.to(dtype)
    ours = normfused.convert(copy.deepcopy(stock)) if converted is None else converted.to(dtype)
    shapes = shapes or [(4, 3, 5, 5), (4, 3, 5, 5), (6, 3, 5, 5)]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    for got, expected in zip(*(run(m, shapes, dtype, backward) for m in (ours, stock)), strict=True):
        if isinstance(expected, list):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        else:
            assert got == expected
    if fused is not None:
        assert len(normfused.conversion_report(ours).fused) == fused, normfused.conversion_report(ours)
    return ours


# ---- contexts --------------------------------------------------------------------------------------------------------


def frozen_stem(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = m.stem(x)
    return m.head(x)


@torch.no_grad()
def _stem_without_grad(m: Net, x: Tensor) -> Tensor:
    return m.stem(x)


def frozen_stem_by_decorator(m: Net, x: Tensor) -> Tensor:
    return m.head(_stem_without_grad(m, x))


def gradients_disabled_by_a_call(m: Net, x: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    x = m.stem(x)
    torch.set_grad_enabled(before)
    return m.head(x)


def gradients_enabled_by_training(m: Net, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(not m.training):
        x = m.stem(x)
    return m.head(x)


def inference_mode_stem(m: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = m.stem(x.detach())
    return m.head(y.clone())


@torch.inference_mode()
def _stem_in_inference_mode(m: Net, x: Tensor) -> Tensor:
    return m.stem(x)


def inference_mode_by_decorator(m: Net, x: Tensor) -> Tensor:
    return m.head(_stem_in_inference_mode(m, x.detach()).clone())


def gradients_end_between_norm_and_relu(m: Net, x: Tensor) -> Tensor:
    y = m.stem[1](m.stem[0](x))
    with torch.no_grad():
        z = F.relu(y)
    return m.head(z + x)


def no_stats_update_around_the_stem(m: Net, x: Tensor) -> Tensor:
    with normfused.no_stats_update():
        x = m.stem(x)
    return m.head(x)


CONTEXTS = [
    (frozen_stem, 2),
    (frozen_stem_by_decorator, 2),
    (gradients_disabled_by_a_call, 2),
    (gradients_enabled_by_training, 2),
    (inference_mode_stem, None),
    (inference_mode_by_decorator, None),
    (gradients_end_between_norm_and_relu, 1),
]


@pytest.mark.parametrize(("function", "fused"), CONTEXTS, ids=[f.__name__ for f, _ in CONTEXTS])
def test_gradient_contexts_inside_forward(function: Callable[[Net, Tensor], Tensor], fused: int | None) -> None:
    ours = assert_same(Net(function), fused=fused)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    ours.zero_grad(set_to_none=True)
    ours(x).sum().backward()
    assert ours.stem[0].weight.grad is None
    assert ours.head[0].weight.grad is not None


@normfused.no_stats_update()
def _stem_without_updates(m: Net, x: Tensor) -> Tensor:
    return m.stem(x)


def no_stats_update_by_decorator(m: Net, x: Tensor) -> Tensor:
    return m.head(_stem_without_updates(m, x))


@pytest.mark.parametrize("function", [no_stats_update_around_the_stem, no_stats_update_by_decorator])
def test_no_stats_update_inside_forward(function: Callable[[Net, Tensor], Tensor]) -> None:
    ours = normfused.convert(Net(function))
    for _ in range(3):
        ours(torch.randn(4, 3, 5, 5))
    assert ours.stem[1].num_batches_tracked == 0
    assert torch.equal(ours.stem[1].running_mean, torch.zeros(3))
    assert ours.head[1].num_batches_tracked == 3


def test_no_stats_update_around_calls() -> None:
    ours = normfused.convert(block())
    x = torch.randn(4, 3, 5, 5)
    for expected in (1, 2):
        ours(x)
        with normfused.no_stats_update():
            ours(x)
        assert ours[1].num_batches_tracked == expected


def autocast_disabled_for_the_norm(m: Net, x: Tensor) -> Tensor:
    y = m.stem[0](x)
    with torch.autocast("cpu", enabled=False):
        y = m.stem[1](y.float())
    return m.head(m.stem[2](y))


def autocast_for_the_stem(m: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.stem(x)
    return m.head(y.float())


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("function", [autocast_disabled_for_the_norm, autocast_for_the_stem])
def test_autocast_inside_and_around_forward(function: Callable[[Net, Tensor], Tensor], outer: bool) -> None:
    stock = Net(function)
    ours = normfused.convert(copy.deepcopy(stock))
    for _ in range(2):
        x = torch.randn(4, 3, 5, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
            got, expected = ours(x), stock(x)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
        got.sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


def test_contexts_around_calls_have_graphs_of_their_own() -> None:
    ours, stock = normfused.convert(Net(frozen_stem)), Net(frozen_stem)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(4, 3, 5, 5)
    for _ in range(2):
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                got, expected = ours(x), stock(x)
            torch.testing.assert_close(got, expected)
            assert (got.requires_grad, got.is_inference()) == (expected.requires_grad, expected.is_inference())
    # One static graph each; the second round captures nothing new.
    assert normfused.conversion_report(ours).graphs == 3


# ---- branches --------------------------------------------------------------------------------------------------------


class Optional(nn.Module):
    def __init__(self, has_shortcut: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.shortcut = nn.BatchNorm2d(3) if has_shortcut else None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.body(x) + (x if self.shortcut is None else self.shortcut(x))
        return torch.relu(y) if scale is None else torch.relu(y) * scale


@pytest.mark.parametrize("has_shortcut", [True, False])
def test_branches_on_none(has_shortcut: bool) -> None:
    stock = Optional(has_shortcut)
    ours = assert_same(stock, fused=1)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x, scale=x), stock(x, scale=x))
    torch.testing.assert_close(ours(x, None), stock(x, None))


def by_type(m: Net, x: Tensor) -> Tensor:
    return m.head(x) if isinstance(m.stem[2], nn.ReLU) and type(m.stem[0]) is nn.Conv2d else m.stem(x)


def by_requires_grad(m: Net, x: Tensor) -> Tensor:
    return m.stem(x) if m.stem[0].weight.requires_grad and x.requires_grad else m.head(x)


def by_grad_mode(m: Net, x: Tensor) -> Tensor:
    return m.stem(x) if torch.is_grad_enabled() else m.head(x)


def by_training(m: Net, x: Tensor) -> Tensor:
    return F.dropout(m.stem(x), 0.5, m.training) if m.training else m.head(m.stem(x))


def by_data(m: Net, x: Tensor) -> Tensor:
    y = m.stem(x)
    return m.head(y) if y.mean() > 0.4 else m.head(-y)


def by_size(m: Net, x: Tensor) -> Tensor:
    return m.stem(x) if x.size(0) > 5 else m.head(x)


@pytest.mark.parametrize("function", [by_type, by_requires_grad, by_grad_mode, by_training, by_data, by_size])
def test_branches(function: Callable[[Net, Tensor], Tensor]) -> None:
    stock = Net(function)
    ours = assert_same(stock)
    shapes = [(4, 3, 5, 5), (7, 3, 4, 4)]
    assert_same(stock, shapes, backward=False, converted=ours)
    with torch.no_grad():
        assert_same(stock, shapes, backward=False, converted=ours)
    for m in (stock, ours):
        m.eval()
    assert_same(stock, shapes, converted=ours)
    for m in (stock, ours):
        m.train().stem.requires_grad_(False)
    assert_same(stock, shapes, converted=ours)


# ---- state -----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = block()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(3, dtype=torch.float64))
        self.calls, self.seen = 0, []
        self.features: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.calls += 1
        y = self.block(x)
        with torch.no_grad():
            self.average = 0.9 * self.average + 0.1 * y.detach().mean((0, 2, 3)).double()
        self.features = y
        self.seen.append(x.size(0))
        return y * self.calls


def test_counters_buffers_and_attributes_changed_in_forward() -> None:
    stock = Counting()
    ours = assert_same(stock)
    assert (ours.steps, ours.calls, ours.seen) == (3, 3, [4, 4, 6])
    torch.testing.assert_close(ours.features, stock.features)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    y = ours(x)
    assert torch.equal(ours.features * ours.calls, y)


class StoredBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        self.normalized = self.norm(x)
        return self.act(self.normalized)


def test_a_value_that_is_stored_is_not_fused_away() -> None:
    stock = StoredBetween()
    ours = assert_same(stock, fused=0)
    torch.testing.assert_close(ours.normalized, stock.normalized)
    assert (ours.normalized < 0).any()


def drop_by_python(m: Net, x: Tensor) -> Tensor:
    return m.head(x) if random.random() < 0.5 else m.head(m.stem(x))


def drop_by_torch(m: Net, x: Tensor) -> Tensor:
    return m.head(x) if torch.rand(()).item() < 0.5 else m.head(m.stem(x))


def drop_by_numpy(m: Net, x: Tensor) -> Tensor:
    return m.head(x) if np.random.rand() < 0.5 else m.head(m.stem(x))  # noqa: NPY002


def noise_by_numpy(m: Net, x: Tensor) -> Tensor:
    return m.head(m.stem(x) + torch.from_numpy(np.random.standard_normal(tuple(x.shape))))  # noqa: NPY002


def dropout_between(m: Net, x: Tensor) -> Tensor:
    return m.head(F.relu(F.dropout(m.stem[1](x), 0.5)))


@pytest.mark.parametrize("function", [drop_by_python, drop_by_torch, drop_by_numpy, noise_by_numpy, dropout_between])
def test_random_parts_draw_the_same_numbers(function: Callable[[Net, Tensor], Tensor]) -> None:
    assert_same(Net(function), shapes=[(4, 3, 5, 5)] * 8)


SHIFT = torch.full((), 0.5, dtype=torch.float64)
SETTINGS = {"scale": 2.0}


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = block()
        self.offset = torch.ones((), dtype=torch.float64)  # neither a parameter nor a buffer

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x * SETTINGS["scale"] + self.offset) + SHIFT


def test_plain_tensor_attributes_and_module_level_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Constants()
    ours = assert_same(stock)
    for m in (stock, ours):
        m.offset = torch.full((), 7.0, dtype=torch.float64)
    assert_same(stock, converted=ours)
    monkeypatch.setitem(SETTINGS, "scale", -3.0)
    monkeypatch.setattr("test_convert_python.SHIFT", torch.full((), -2.0, dtype=torch.float64))
    assert_same(stock, converted=ours)


def test_options_of_layers_changed_between_calls() -> None:
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU(0.1), nn.BatchNorm2d(3), nn.Dropout(0.5))
    ours = assert_same(stock)
    for m in (stock, ours):
        m[1].momentum, m[1].eps, m[2].negative_slope, m[4].p = 0.7, 0.5, 0.4, 0.0
    assert_same(stock, converted=ours)
    for m in (stock, ours):
        m[3].momentum, m[1].track_running_stats = None, False
        m[1].eval()
    assert_same(stock, converted=ours)
    for step in range(12):
        for m in (stock, ours):
            m[1].train()
            m[1].momentum = 1 / (step + 2)
        assert_same(stock, converted=ours)


# ---- children --------------------------------------------------------------------------------------------------------


def iterate(m: Net, x: Tensor) -> Tensor:
    for layer in m.stem:
        x = layer(x)
    for _, layer in m.head.named_children():
        x = layer(x)
    return x


def index(m: Net, x: Tensor) -> Tensor:
    return m.head(m.stem[-1](m.stem[1](m.stem[0](x))))


def ask_for_attributes(m: Net, x: Tensor) -> Tensor:
    norm = m.stem[1]
    return m.head(m.stem(x) * norm.num_features + norm.eps + len(m.stem) + norm.weight.sum() + m.stem[0].out_channels)


def ask_for_types(m: Net, x: Tensor) -> Tensor:
    for layer in m.stem:
        x = layer(x) * 2 if isinstance(layer, nn.BatchNorm2d) else layer(x)
    return x


def call_forward(m: Net, x: Tensor) -> Tensor:
    return m.head.forward(m.stem[1].forward(x))


@pytest.mark.parametrize("function", [iterate, index, ask_for_attributes, ask_for_types, call_forward])
def test_children_used_by_their_parent(function: Callable[[Net, Tensor], Tensor]) -> None:
    assert_same(Net(function))


class Head(nn.Module):
    """Calls its blocks through methods other than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = block(), block()

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encode(x))


def test_methods_other_than_forward_are_fused_in_their_children() -> None:
    torch.manual_seed(0)
    stock = Head().double()
    ours = normfused.convert(copy.deepcopy(stock))
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.encode(x), stock.encode(x))
    assert normfused.conversion_report(ours).fused == {"encoder.1": "relu"}
    assert_same(stock, converted=ours)


class Routed(nn.Module):
    """As detection models are written: modules with attributes `f` and `i`, and a list of earlier outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(block(), block(), nn.Identity(), nn.Conv2d(6, 3, 1))
        for i, layer in enumerate(self.model):
            layer.i, layer.f, layer.type = i, -1, type(layer).__name__
        self.model[2].f = 0
        self.model[3].f = [1, 2]
        self.save = [0, 1]
        self.pretrained_cfg = {"url": "", "num_classes": 10}

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor | None] = []
        for layer in self.model:
            if layer.f != -1:
                x = outputs[layer.f] if isinstance(layer.f, int) else torch.cat([outputs[j] for j in layer.f], 1)
            x = layer(x)
            outputs.append(x if layer.i in (*self.save, 2) else None)
        return x


def test_models_that_route_by_attributes_of_their_children() -> None:
    ours = assert_same(Routed(), fused=2)
    assert ours.pretrained_cfg == {"url": "", "num_classes": 10}
    assert [layer.f for layer in ours.model] == [-1, -1, 0, [1, 2]]


# ---- hooks -----------------------------------------------------------------------------------------------------------


def add_hooks(m: nn.Sequential, which: str, seen: list[str]) -> None:
    layer = {"container": m, "norm": m[1], "relu": m[2]}[which]
    layer.register_forward_pre_hook(lambda *_: seen.append("pre"))
    layer.register_forward_hook(lambda _, __, y: (seen.append("forward"), y * 2)[1])
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))


@pytest.mark.parametrize("which", ["container", "norm", "relu"])
@pytest.mark.parametrize("when", ["before", "after conversion", "after a call"])
def test_hooks_run_whenever_they_are_added(which: str, when: str) -> None:
    results, calls = [], []
    start = block().double()
    for converted in (True, False):
        torch._dynamo.reset()
        model, seen = copy.deepcopy(start), []
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if when == "before":
            add_hooks(model, which, seen)
        if converted:
            normfused.convert(model)
        if when == "after conversion":
            add_hooks(model, which, seen)
        model(x)
        if when == "after a call":
            add_hooks(model, which, seen)
        for _ in range(2):
            y = model(x)
            y.sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters())])
        calls.append(seen)
    assert calls[0] == calls[1]
    assert calls[0].count("backward") == 2
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


def test_hooks_removed_after_a_call_no_longer_run() -> None:
    model, seen = normfused.convert(block()), []
    handle = model[2].register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(4, 3, 5, 5)
    model(x)
    handle.remove()
    model(x)
    assert seen == [1]


def test_hooks_on_tensors_in_forward() -> None:
    grads: list[Tensor] = []

    def hooked(m: Net, x: Tensor) -> Tensor:
        y = m.stem(x)
        y.register_hook(grads.append)
        return m.head(y)

    results = []
    stock = Net(hooked).double()
    for model in (normfused.convert(copy.deepcopy(stock)), stock):
        grads.clear()
        model(torch.ones(4, 3, 5, 5, dtype=torch.float64).cumsum(0)).square().sum().backward()
        results.append([g.clone() for g in grads])
    assert len(results[0]) == len(results[1]) == 1
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def hook_between(m: Net, x: Tensor) -> Tensor:
    y = m.stem[1](m.stem[0](x))
    if y.requires_grad:
        y.register_hook(lambda grad: grad * 3)
    return m.head(F.relu(y))


def saved_elsewhere(m: Net, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
        y = m.stem(x)
    return m.head(y)


def saved_on_cpu(m: Net, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return m.head(m.stem(x))


@pytest.mark.parametrize("function", [hook_between, saved_elsewhere, saved_on_cpu])
def test_hooks_of_autograd_in_forward(function: Callable[[Net, Tensor], Tensor]) -> None:
    assert_same(Net(function))


def test_hooks_for_saved_tensors_around_calls() -> None:
    stock = Net(by_size)
    ours = assert_same(stock)
    packed: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(1), t)[1], lambda t: t):
        assert_same(stock, converted=ours)
    assert packed


def test_a_gradient_that_is_retained_in_between() -> None:
    kept: list[Tensor] = []

    def retain(m: Net, x: Tensor) -> Tensor:
        y = m.stem[1](x)
        y.retain_grad()
        kept.append(y)
        return m.head(F.relu(y))

    stock = Net(retain).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    for model in (normfused.convert(copy.deepcopy(stock)), stock):
        model(x).pow(3).sum().backward()
    torch.testing.assert_close(kept[0].grad, kept[1].grad, rtol=1e-10, atol=1e-10)


def test_global_module_hooks() -> None:
    names: list[str] = []
    model = normfused.convert(block())
    x = torch.randn(4, 3, 5, 5)
    model(x)
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: names.append(type(m).__name__))
    try:
        model(x)
    finally:
        handle.remove()
    assert names == ["Conv2d", "BatchNorm2d", "ReLU", "Sequential"]


# ---- outputs ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


@dataclasses.dataclass
class Features:
    low: Tensor
    high: Tensor


class Record(OrderedDict):
    """As libraries return their results: a dictionary whose items are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@pytest.mark.parametrize("kind", [dict, OrderedDict, Pair, Features, Record, tuple, list])
def test_outputs_of_every_kind(kind: type) -> None:
    def forward(m: Net, x: Tensor) -> Any:
        low = m.stem(x)
        values = {"low": low, "high": m.head(low)}
        return kind(values.values()) if kind in (tuple, list) else kind(**values)

    ours = assert_same(Net(forward))
    assert type(ours(torch.randn(4, 3, 5, 5, dtype=torch.float64))) is kind


def test_keyword_and_nested_inputs() -> None:
    class Fusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block()

        def forward(self, pair: dict[str, Tensor], *, scale: float, extra: list[Tensor] | None = None) -> Tensor:
            y = self.block(pair["a"]) + pair["b"] * scale
            return y if extra is None else y + sum(extra)

    stock = Fusion().double()
    ours = normfused.convert(copy.deepcopy(stock))
    a, b = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    for arguments in ({"scale": 2.0}, {"scale": 3.5, "extra": [a, b]}, {"scale": 0.5, "extra": []}):
        torch.testing.assert_close(ours({"a": a, "b": b}, **arguments), stock({"a": a, "b": b}, **arguments))


def test_generators_and_other_callables_run_as_they_are() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList([block(), block()])

        def forward(self, x: Tensor) -> Any:
            for stage in self.stages:
                x = stage(x)
                yield x

    stock = Stages().double()
    ours = normfused.convert(copy.deepcopy(stock))
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close([*ours(x)], [*stock(x)])


# ---- checkpointing ---------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, where: str, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.head = block(), block()
        self.where, self.reentrant = where, reentrant

    def forward(self, x: Tensor) -> Tensor:
        inside = self.where == "inside"
        x = checkpoint(self.stem, x, use_reentrant=self.reentrant) if inside else self.stem(x)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["inside", "around", "around its caller"])
def test_activation_checkpointing_updates_statistics_once(where: str, reentrant: bool) -> None:
    stock = Checkpointed("nowhere", reentrant).double()
    ours = normfused.convert(copy.deepcopy(stock))
    ours.where = where

    def call(x: Tensor) -> Tensor:
        if where == "around":
            return checkpoint(ours, x, use_reentrant=reentrant)
        if where == "around its caller":
            return checkpoint(lambda x: ours(x * 2), x, use_reentrant=reentrant)
        return ours(x)

    for step in range(1, 4):
        x = torch.randn(3 + step, 3, 5, 5, dtype=torch.float64)
        results = []
        for function in (call, stock):
            leaf = x.clone().requires_grad_()
            y = function(leaf * 2 if where == "around its caller" and function is stock else leaf)
            y.pow(3).sum().backward()
            results.append([y, leaf.grad])
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
        assert ours.stem[1].num_batches_tracked == ours.head[1].num_batches_tracked == step
    for got, expected in zip(ours.state_dict().values(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for got, expected in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-10, atol=1e-10)


class Cube(torch.autograd.Function):
    """Its gradient is not that of its formula, so that a derivative by any other way is noticed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x


def test_custom_backward_passes() -> None:
    assert_same(Net(lambda m, x: m.head(Cube.apply(m.stem(x)))))


def test_errors_are_those_of_the_model() -> None:
    class MistakeError(Exception):
        pass

    def wrong(m: Net, x: Tensor) -> Tensor:
        y = m.stem(x)
        if x.size(0) == 5:
            raise MistakeError("five")
        return y

    ours = normfused.convert(Net(wrong))
    ours(torch.randn(4, 3, 5, 5))
    with pytest.raises(MistakeError, match="five"):
        ours(torch.randn(5, 3, 5, 5))
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels"):
        ours(torch.randn(4, 2, 5, 5))
    with pytest.raises(ValueError, match="BatchNorm2d: expected more than 1 value per channel when training"):
        ours(torch.randn(1, 3, 1, 1))
    with pytest.raises(TypeError, match="positional argument"):
        ours()
