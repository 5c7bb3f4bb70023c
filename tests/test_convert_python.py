"""A converted model does what its Python code says: contexts, branches, state, children.

Each case is the smallest model of one kind. It runs unconverted and converted, for the same steps. Everything
observable must be equal: outputs, gradients, parameters, buffers, attributes.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from converted import Net, assert_same, block
from torch import Tensor, nn
from torch.nn import functional as F

import normfused

pytestmark = pytest.mark.usefixtures("needs_extension", "_fresh_compiler")


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


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


def test_contexts_around_calls_have_separate_graphs() -> None:
    ours, stock = normfused.convert(Net(frozen_stem)), Net(frozen_stem)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(4, 3, 5, 5)
    for _ in range(2):
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                got, expected = ours(x), stock(x)
            torch.testing.assert_close(got, expected)
            assert (got.requires_grad, got.is_inference()) == (expected.requires_grad, expected.is_inference())
    # One static graph per context; the second round captures nothing.
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


def read_attributes(m: Net, x: Tensor) -> Tensor:
    norm = m.stem[1]
    return m.head(m.stem(x) * norm.num_features + norm.eps + len(m.stem) + norm.weight.sum() + m.stem[0].out_channels)


def check_types(m: Net, x: Tensor) -> Tensor:
    for layer in m.stem:
        x = layer(x) * 2 if isinstance(layer, nn.BatchNorm2d) else layer(x)
    return x


def call_forward(m: Net, x: Tensor) -> Tensor:
    return m.head.forward(m.stem[1].forward(x))


@pytest.mark.parametrize("function", [iterate, index, read_attributes, check_types, call_forward])
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
    """Written like detection models: modules with attributes `f` and `i`, and a list of earlier outputs."""

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
