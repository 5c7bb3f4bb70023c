"""Which patterns are fused in a graph, which are not, and the reason. Results are equal in both cases."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfused
from normfused.conversion.graph import changes_context, written_by

pytestmark = pytest.mark.usefixtures("needs_extension", "_fresh_compiler")


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


class Case(nn.Module):
    """A module whose forward is the given function."""

    def __init__(self, function: Callable[[Case, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.conv = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.shared = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = model(leaf * 1)  # so that it can be written in place
    if y.requires_grad:
        y.pow(3).sum().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def converted_is_the_same(function: Callable[[Case, Tensor], Tensor], **options: bool) -> normfused.ConversionReport:
    torch.manual_seed(0)
    stock = Case(function).double()
    ours = normfused.convert(copy.deepcopy(stock), **options)
    for shape in ((4, 4, 5, 5), (6, 4, 3, 3), (5, 4, 3, 2)):  # captured for any size from the second on
        torch.manual_seed(1)
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(results(ours, x), results(stock, x), rtol=1e-10, atol=1e-10)
    for m in (stock, ours):
        m.eval()
    torch.testing.assert_close(results(ours, x), results(stock, x), rtol=1e-10, atol=1e-10)
    return normfused.conversion_report(ours)


# ---- fused -----------------------------------------------------------------------------------------------------------


def added_in_place_to_the_norm(m: Case, x: Tensor) -> Tensor:
    y = m.a(m.conv(x))
    y += x
    return F.relu(y, inplace=True)


FUSED: dict[str, tuple[Callable[[Case, Tensor], Tensor], dict[str, str]]] = {
    "relu": (lambda m, x: torch.relu(m.a(x)), {"a": "relu"}),
    "relu as a method": (lambda m, x: m.a(x).relu(), {"a": "relu"}),
    "relu in place": (lambda m, x: m.a(x).relu_(), {"a": "relu"}),
    "relu with inplace": (lambda m, x: F.relu(m.a(x), True), {"a": "relu"}),
    "relu6": (lambda m, x: F.relu6(m.a(x)), {"a": "relu6"}),
    "nn.ReLU6": (lambda m, x: nn.ReLU6(True)(m.a(x)), {"a": "relu6"}),
    "hardtanh": (lambda m, x: F.hardtanh(m.a(x), 0, 6), {"a": "relu6"}),
    "leaky_relu": (lambda m, x: F.leaky_relu(m.a(x), 0.3), {"a": "leaky_relu"}),
    "nn.LeakyReLU": (lambda m, x: nn.LeakyReLU(0.2)(m.a(x)), {"a": "leaky_relu"}),
    "elu": (lambda m, x: F.elu(m.a(x), alpha=0.7), {"a": "elu"}),
    "nn.ELU": (lambda m, x: nn.ELU()(m.a(x)), {"a": "elu"}),
    "hardswish": (lambda m, x: F.hardswish(m.a(x)), {"a": "hardswish"}),
    "sigmoid": (lambda m, x: m.a(x).sigmoid(), {"a": "sigmoid"}),
    "tanh": (lambda m, x: torch.tanh(m.a(x)), {"a": "tanh"}),
    "silu": (lambda m, x: F.silu(m.a(x), inplace=True), {"a": "silu"}),
    "gelu": (lambda m, x: F.gelu(m.a(x)), {"a": "gelu"}),
    "gelu_tanh": (lambda m, x: F.gelu(m.a(x), approximate="tanh"), {"a": "gelu_tanh"}),
    "add": (lambda m, x: m.a(x) + x, {"a": "add"}),
    "added from the left": (lambda m, x: x.add(m.a(x), alpha=1), {"a": "add"}),
    "add and silu": (lambda m, x: F.silu(torch.add(x, m.a(m.conv(x)))), {"a": "add + silu"}),
    "added in place": (added_in_place_to_the_norm, {"a": "add + relu"}),
    "two norms": (lambda m, x: F.leaky_relu(m.a(x) + m.b(x * 2), 0.3), {"a": "add + leaky_relu"}),
    "called twice": (lambda m, x: F.elu(m.a(torch.tanh(m.a(x)))), {"a": "tanh; elu"}),
    "identities in between": (
        lambda m, x: F.relu(nn.Dropout(0.0)(F.dropout(nn.Identity()(m.a(x)), 0.5, False))),
        {"a": "relu"},
    ),
    "a residual that is a view": (lambda m, x: torch.relu(m.a(m.conv(x)) + x.view(x.shape)), {"a": "add + relu"}),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_patterns(name: str) -> None:
    function, fused = FUSED[name]
    assert converted_is_the_same(function).fused == fused


# ---- not fused -------------------------------------------------------------------------------------------------------


def read_twice(m: Case, x: Tensor) -> Tensor:
    y = m.a(x)
    return torch.relu(y) + y


def input_changed(m: Case, x: Tensor) -> Tensor:
    x = x.detach()
    m.a.requires_grad_(False)
    y = m.a(x)
    x.mul_(2)
    return torch.relu(y)


def input_changed_through_a_chunk(m: Case, x: Tensor) -> Tensor:
    x = x.detach()
    m.a.requires_grad_(False)
    first, _ = x.chunk(2, 1)
    y = m.a(x)
    first.zero_()
    return torch.relu(y)


def input_changed_through_its_base(m: Case, x: Tensor) -> Tensor:
    base = x.detach()
    m.a.requires_grad_(False)
    y = m.a(base.view(base.shape))
    base[0] = 0
    return torch.relu(y)


def residual_changed(m: Case, x: Tensor) -> Tensor:
    r = x * 2
    y = m.a(x)
    r.add_(1)
    return torch.relu(y + r)


def residual_changed_through_a_slice(m: Case, x: Tensor) -> Tensor:
    r = x * 2
    part = r[:, 1:]
    y = m.a(x)
    part += 1
    return torch.relu(y + r)


def residual_changed_by_out(m: Case, x: Tensor) -> Tensor:
    r = x.detach() * 2
    y = m.a(x)
    torch.mul(x.detach(), 3, out=r)
    return torch.relu(y + r)


def residual_changed_by_inplace_relu(m: Case, x: Tensor) -> Tensor:
    r = x * 2
    y = m.a(x)
    F.relu(r, True)
    return torch.tanh(y + r)


def added_to_another(m: Case, x: Tensor) -> Tensor:
    r = x * 2
    s = r
    r += m.a(x)
    return torch.relu(r) * s


def added_to_a_viewed_tensor(m: Case, x: Tensor) -> Tensor:
    r = x * 2
    flat = r.view(-1)
    r += m.a(x)
    return torch.relu(r) + flat.view_as(r)


def saved_residual_changed_later(m: Case, x: Tensor) -> Tensor:
    r = x.detach() * 2
    y = F.silu(m.a(x) + r)
    r.zero_()
    return y + r


def weight_changed(m: Case, x: Tensor) -> Tensor:
    m.a.requires_grad_(False)
    y = m.a(x.detach())
    m.a.weight.mul_(0.5)
    return torch.relu(y)


def statistics_read(m: Case, x: Tensor) -> Tensor:
    y = m.a(x)
    mean = m.a.running_mean * 1
    return torch.relu(y) + mean.view(1, -1, 1, 1)


def counter_read(m: Case, x: Tensor) -> Tensor:
    y = m.a(x)
    count = m.a.num_batches_tracked + 0
    return torch.relu(y) * count


def layer_called_in_between(m: Case, x: Tensor) -> Tensor:
    y = m.a(x)
    z = m.a(x * 2)
    return torch.relu(y) + torch.relu(z)


def output_viewed(m: Case, x: Tensor) -> Tensor:
    y = m.a(x)
    v = y.view(-1)
    v.relu_()
    return y


def number_added(m: Case, x: Tensor) -> Tensor:
    return torch.relu(m.a(x) + x.size(1))


def scalar_tensor_added(m: Case, x: Tensor) -> Tensor:
    return torch.relu(m.a(x) + x.mean())


def scaled_addition(m: Case, x: Tensor) -> Tensor:
    return torch.relu(torch.add(m.a(x), x, alpha=2))


def dropped_out(m: Case, x: Tensor) -> Tensor:
    return torch.relu(F.dropout(m.a(x), 0.5, m.training))


NOT_FUSED: list[tuple[Callable[[Case, Tensor], Tensor], str]] = [
    (read_twice, "its output is used more than once"),
    (input_changed, "its operands are changed in between"),
    (input_changed_through_a_chunk, "its operands are changed in between"),
    (input_changed_through_its_base, "its operands are changed in between"),
    (residual_changed, "its operands are changed in between"),
    (residual_changed_through_a_slice, "its operands are changed in between"),
    (residual_changed_by_out, "its operands are changed in between"),
    (residual_changed_by_inplace_relu, "its operands are changed in between"),
    (added_to_another, "it is added in place to another tensor"),
    (added_to_a_viewed_tensor, "it is added in place to another tensor"),
    (saved_residual_changed_later, "the addend is changed later"),
    (weight_changed, "its operands are changed in between"),
    (statistics_read, "its running statistics are used in between"),
    (counter_read, "its running statistics are used in between"),
    (layer_called_in_between, "its operands are changed in between"),
    (output_viewed, "its output is used more than once"),
    (number_added, "the addend is not another tensor"),
    (scalar_tensor_added, "the addend has another shape"),
    (scaled_addition, "it is followed by add"),
    (dropped_out, "it is followed by dropout"),
]


@pytest.mark.parametrize(("function", "reason"), NOT_FUSED, ids=[f.__name__ for f, _ in NOT_FUSED])
def test_patterns_that_are_not_fused(function: Callable[[Case, Tensor], Tensor], reason: str) -> None:
    torch.manual_seed(0)
    stock = Case(function).double()
    ours = normfused.convert(copy.deepcopy(stock))
    for shape in ((4, 4, 5, 5), (6, 4, 3, 3)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.manual_seed(1)
        got = results(ours, x)
        torch.manual_seed(1)
        torch.testing.assert_close(got, results(stock, x), rtol=1e-10, atol=1e-10)
    assert normfused.conversion_report(ours).unfused["a"] == reason


def test_a_residual_of_one_channel_is_not_fused() -> None:
    report = converted_is_the_same(lambda m, x: torch.relu(m.a(x) + x[:, :1]))
    assert report.unfused["a"] == "the addend has another shape"


def test_a_residual_of_another_dtype_is_not_fused() -> None:
    torch.manual_seed(0)
    stock = Case(lambda m, x: torch.relu(m.a(x) + x.double()))
    ours = normfused.convert(copy.deepcopy(stock))
    x = torch.randn(4, 4, 5, 5)
    assert ours(x).dtype == torch.float64
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-5)
    assert normfused.conversion_report(ours).unfused["a"] == "the addend has another dtype or device"


# ---- in place --------------------------------------------------------------------------------------------------------


def conv_and_leaky_relu(m: Case, x: Tensor) -> Tensor:
    return F.leaky_relu(m.a(m.conv(x)), 0.1)


def conv_read_twice(m: Case, x: Tensor) -> Tensor:
    y = m.conv(x)
    return F.leaky_relu(m.a(y), 0.1) + y


def not_from_a_layer(m: Case, x: Tensor) -> Tensor:
    return F.leaky_relu(m.a(x * 2), 0.1)


def written_over_later(m: Case, x: Tensor) -> Tensor:
    y = F.leaky_relu(m.a(m.conv(x)))
    y += 1
    return y


def written_over_later_through_a_view(m: Case, x: Tensor) -> Tensor:
    y = F.leaky_relu(m.a(m.conv(x)))
    y[0].mul_(2)
    return y


def of_a_sum(m: Case, x: Tensor) -> Tensor:
    return F.leaky_relu(m.a(m.conv(x)) + x)


def of_another_activation(m: Case, x: Tensor) -> Tensor:
    return F.relu(m.a(m.conv(x)))


INPLACE: list[tuple[Callable[[Case, Tensor], Tensor], str]] = [
    (conv_and_leaky_relu, "leaky_relu, in place"),
    (conv_read_twice, "leaky_relu"),
    (not_from_a_layer, "leaky_relu"),
    (written_over_later, "leaky_relu"),
    (written_over_later_through_a_view, "leaky_relu"),
    (of_a_sum, "add + leaky_relu"),
    (of_another_activation, "relu"),
]


@pytest.mark.parametrize(("function", "fused"), INPLACE, ids=[f.__name__ for f, _ in INPLACE])
def test_in_place_if_nothing_else_reads_the_input(function: Callable[[Case, Tensor], Tensor], fused: str) -> None:
    assert converted_is_the_same(function, inplace=True).fused["a"] == fused


# ---- rules -----------------------------------------------------------------------------------------------------------


def nodes_of(function: Callable[..., object], *inputs: Tensor) -> list[torch.fx.Node]:
    nodes: list[torch.fx.Node] = []

    def keep(gm: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        nodes.extend(gm.graph.nodes)
        return gm.forward

    torch.compile(function, backend=keep)(*inputs)
    return nodes


WRITES: list[tuple[Callable[[Tensor, Tensor], object], list[str]]] = [
    (lambda a, b: a.add_(b), ["a"]),
    (lambda a, b: operator.iadd(a, b), ["a"]),
    (lambda a, b: a.copy_(b), ["a"]),
    (lambda a, b: torch.relu_(a) + b, ["a"]),
    (lambda a, b: F.dropout(a, 0.5, True, True) + b, ["a"]),
    (lambda a, b: torch.add(a, a, out=b), ["b"]),
    (lambda a, b: a.__setitem__(0, b[0]), ["a"]),
    (lambda a, b: torch.ops.aten.mul_(a, b), ["a"]),
    (lambda a, b: torch._foreach_add_([a, b], 1.0), ["a", "b"]),
    (lambda a, b: torch.relu(a) + b.view(-1)[0] + torch.cat([a, b]).sum() + a.t().sum() + a.to(a.dtype), []),
]


@pytest.mark.parametrize(("function", "written"), WRITES, ids=range(len(WRITES)))
def test_written_operands_are_found(function: Callable[[Tensor, Tensor], object], written: list[str]) -> None:
    def called(a: Tensor, b: Tensor) -> Tensor:
        function(a, b)
        return a + b

    nodes = nodes_of(called, torch.randn(4, 4), torch.randn(4, 4))
    found = {operand.name.removeprefix("l_").rstrip("_") for node in nodes for operand in written_by(node)}
    assert {name for name in found if name in ("a", "b")} == set(written)


def test_context_changes_are_found() -> None:
    def called(a: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu"):
            b = a * 2
        return a + b.sum() * len(a.shape)

    nodes = nodes_of(called, torch.randn(4, 4))
    names = {node.name for node in nodes if changes_context(node)}
    assert len(names) == 4
    assert all("grad" in name or "autocast" in name for name in names)
