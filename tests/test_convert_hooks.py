"""Hooks, outputs, checkpointing and errors of a converted model are those of the model."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from converted import Net, assert_same, block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import normfused

pytestmark = pytest.mark.usefixtures("needs_extension", "_fresh_compiler")


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


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
    stock = Net(lambda m, x: m.head(m.stem(x)))
    ours = assert_same(stock)
    packed: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(1), t)[1], lambda t: t):
        assert_same(stock, converted=ours)
    assert packed


def test_a_gradient_that_is_retained_in_between() -> None:
    retained: list[Tensor] = []

    def retain(m: Net, x: Tensor) -> Tensor:
        y = m.stem[1](x)
        y.retain_grad()
        retained.append(y)
        return m.head(F.relu(y))

    stock = Net(retain).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    for model in (normfused.convert(copy.deepcopy(stock)), stock):
        model(x).pow(3).sum().backward()
    torch.testing.assert_close(retained[0].grad, retained[1].grad, rtol=1e-10, atol=1e-10)


def test_global_module_hooks() -> None:
    names: list[str] = []
    x = torch.randn(4, 3, 5, 5)
    called, fresh = normfused.convert(block()), normfused.convert(block())
    called(x)
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: names.append(type(m).__name__))
    try:
        called(x), fresh(x)
    finally:
        handle.remove()
    assert names == ["Conv2d", "BatchNorm2d", "ReLU", "Sequential"] * 2
    assert "nothing is fused so far: calls with hooks on all modules are not" in str(normfused.conversion_report(fresh))
    fresh(x)
    assert "1 fused" in str(normfused.conversion_report(fresh))


# ---- outputs ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


@dataclasses.dataclass
class Features:
    low: Tensor
    high: Tensor


class Record(OrderedDict):
    """A dictionary whose items are attributes too, as libraries return."""

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


def test_generators_run_unchanged() -> None:
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
    """Its backward is not the derivative of its forward, so that a derivative computed any other way is detected."""

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
