"""Copies and files of a converted model, and torch's transforms, tracers and compilers around it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from converted import OURS, images, resnet10, types
from torch import Tensor, nn
from zoo import EXPECTED, ZOO

import normfused
from normfused.conversion import bytes_saved_for_backward

pytestmark = pytest.mark.usefixtures("needs_extension", "_fresh_compiler")


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("name", ["mlp", "timm relu"])
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, saved_and_loaded, pickled])
def test_copies(copied: Callable[[nn.Module], nn.Module], name: str, called: bool) -> None:
    torch.manual_seed(0)
    model = normfused.convert(ZOO[name]()).eval()
    x = images(dtype=torch.float32)
    if called:
        model(x)
    other = copied(model)
    assert types(other) == types(model)
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"after copying or loading a model, call normfused\.convert again"):
        normfused.conversion_report(other)
    if copied is not copy.copy:
        normfused.convert(other)
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)
        assert len(normfused.conversion_report(other).fused) == EXPECTED[name][1]
        normfused.revert(other)
        assert not any(isinstance(m, OURS) for m in other.modules())
    assert any(isinstance(m, OURS) for m in model.modules())


def test_a_replica_runs_on_its_own_parameters() -> None:
    """nn.DataParallel copies the attributes of each module, including its compiled call."""
    model = normfused.convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    x = images(dtype=torch.float32)
    model(x)
    replica = model._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(child) for name, child in model._modules.items()}
    with torch.no_grad():
        replica._modules["1"].bias.add_(5)
    assert replica(x).min() > 1
    assert model(x).min() == 0


def test_functional_call_with_other_parameters() -> None:
    torch.manual_seed(0)
    stock = resnet10().double()
    ours = normfused.convert(copy.deepcopy(stock))
    others = {name: p.detach() * 1.5 for name, p in stock.named_parameters()}
    x = images()
    ours(x), stock(x)
    for m in (ours, stock):
        m.eval()
    expected = torch.func.functional_call(stock, others, (x,))
    torch.testing.assert_close(torch.func.functional_call(ours, others, (x,)), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-10, atol=1e-10)


def test_transforms_over_a_converted_model() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU()).double().eval()
    ours = normfused.convert(copy.deepcopy(stock))
    x, t = images(2), images(3)[:2]
    ours(x)
    for compute in (
        lambda m: torch.func.jvp(m, (x,), (t,)),
        lambda m: torch.func.vjp(m, x)[1](t),
        lambda m: torch.func.vmap(lambda one: m(one[None])[0])(x),
        lambda m: torch.func.grad(lambda z: m(z).sum())(x),
    ):
        torch.testing.assert_close(compute(ours), compute(stock), rtol=1e-9, atol=1e-9)


def test_double_backward_through_a_converted_model() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU()).double()
    results = []
    for model in (normfused.convert(copy.deepcopy(stock)), stock):
        x = images().requires_grad_()
        (first,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        first.pow(2).sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_tracing_and_export_of_a_converted_model() -> None:
    torch.manual_seed(0)
    model = normfused.convert(resnet10()).eval()
    x = images(dtype=torch.float32)
    expected = model(x)
    for other in (
        torch.fx.symbolic_trace(model),
        torch.jit.trace(model, (x,)),
        torch.export.export(model, (x,)).module(),
        torch.fx.experimental.proxy_tensor.make_fx(model)(x),
    ):
        torch.testing.assert_close(other(x), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_by_the_user_is_compiled_once(backend: str) -> None:
    torch.manual_seed(0)
    stock = resnet10().double()
    ours = normfused.convert(copy.deepcopy(stock))
    graphs = []

    def counting(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(gm)
        return torch._dynamo.lookup_backend(backend)(gm, inputs)

    compiled = torch.compile(ours, backend=counting)
    for n in (4, 6):
        torch.testing.assert_close(compiled(images(n)), stock(images(n)), rtol=1e-10, atol=1e-10)
    assert len(graphs) == 2
    assert normfused.conversion_report(ours).graphs == 0


@pytest.mark.parametrize("options", [{}, {"then": "aot_eager"}])
def test_the_backend_by_name(options: dict[str, str]) -> None:
    torch.manual_seed(0)
    stock = resnet10().double()
    ours = normfused.convert(copy.deepcopy(stock), fuse=False)
    compiled = torch.compile(ours, backend="normfused", options=options, fullgraph=True)
    results = []
    for model in (compiled, stock):
        x = images().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append([y, x.grad])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    saved = [bytes_saved_for_backward(m, images()) for m in (compiled, ours)]
    assert saved[0] < saved[1]


def test_the_backend_refuses_unknown_options() -> None:
    compiled = torch.compile(normfused.BatchNorm2d(3), backend="normfused", options={"than": "inductor"})
    with pytest.raises(Exception, match="unknown option 'than'; known are 'then' and 'inplace'"):
        compiled(images(dtype=torch.float32))


def test_then_inductor() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    ours = normfused.convert(copy.deepcopy(stock), fuse=False)
    compiled = torch.compile(ours, backend="normfused", options={"then": "inductor"})
    results = []
    for model in (compiled, stock):
        x = images(dtype=torch.float32).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append([y, x.grad])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
