"""Whole models converted, fused, reverted and folded (B24 to B26)."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from models import MODELS, resnet50
from torch import Tensor, fx, nn
from torch.nn import functional as F

import normfused
from normfused.convert import kept_for_backward

OURS = (normfused.BatchNorm1d, normfused.BatchNorm2d, normfused.BatchNorm3d)
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def types(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def three_steps(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and losses' gradients of three steps of SGD, and all state at the end."""
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
    results = []
    for _ in range(3):
        x = torch.randn(6, 3, 64, 64, generator=generator, dtype=torch.float64).to(dtype)
        y = model(x)
        results.append(y.detach())
        optimizer.zero_grad()
        y.square().mean().backward()
        results += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    return results + [t.detach().clone() for t in model.state_dict().values()]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest of all tensors, each relative to its largest value."""
    return max(((a - b).abs().max() / (1 + b.abs().max())).item() for a, b in zip(ours, theirs, strict=True))


@models
def test_b25_fused_models_train_as_before(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    stock = make().double()
    report = normfused.convert(copy.deepcopy(stock))
    assert report.fused
    assert not any(type(m) in (nn.BatchNorm1d, nn.BatchNorm2d) for m in report.model.modules())
    assert list(report.model.state_dict()) == list(stock.state_dict())
    # Three steps of a deep network amplify the last digits: torch itself may be further off in another layout.
    relaid = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    ours, theirs, others = (three_steps(m, torch.float64) for m in (report.model, stock, relaid))
    assert distance(ours, theirs) <= max(1e-10, distance(others, theirs))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(report.model.eval()(x), stock.eval()(x), rtol=1e-10, atol=1e-10)


@models
def test_b25_in_float32_as_close_as_torch(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    exact = make().double()
    stock = copy.deepcopy(exact).float()
    converted = normfused.convert(copy.deepcopy(stock)).model
    x = torch.randn(6, 3, 32, 32)
    truth, theirs, ours = exact(x.double()), stock(x), converted(x)
    error, torch_error = ((y.double() - truth).abs().max().item() for y in (ours, theirs))
    assert error <= 2 * torch_error + 1e-6 * truth.abs().max().item()


# What is fused where; in ResNets all but the shortcuts' own, which are what is added.
EXPECTED = {
    "resnet18": (20, 17),
    "resnet50": (53, 49),
    "densenet": (14, 14),
    "mobilenetv2": (11, 10),
    "unet": (10, 10),
    "gan": (5, 5),
}


@pytest.mark.parametrize("name", MODELS)
def test_b25_what_is_found(name: str) -> None:
    report = normfused.convert(MODELS[name]())
    assert (len(report.replaced), len(report.fused)) == EXPECTED[name]
    assert isinstance(report.model, fx.GraphModule)
    if name == "resnet18":
        assert dict(report.fused)["layer1.0.bn1"] == "BatchNorm2d + relu"
        assert dict(report.fused)["layer1.0.bn2"] == "BatchNorm2d + add + relu"
    if name == "mobilenetv2":
        assert dict(report.fused)["features.1"] == "BatchNorm2d + relu6"
        assert dict(report.fused)["features.3.conv.7"] == "BatchNorm2d + add"
    if name == "gan":
        assert dict(report.fused)["discriminator.1"] == "BatchNorm2d + leaky_relu"


def test_b24_report_is_a_table() -> None:
    report = normfused.convert(resnet50(), example_inputs=(torch.randn(2, 3, 64, 64),))
    lines = str(report).splitlines()
    assert lines[0] == "53 batch norms replaced, 49 fused, 0 skipped"
    assert any(line.split() == ["fused", "layer2.1.bn3", "BatchNorm2d", "+", "add", "+", "relu"] for line in lines)
    assert lines[-1].startswith("kept for backward: ")


@models
@pytest.mark.parametrize("fuse", [True, False])
def test_b24_revert_is_the_inverse(make: Callable[[], nn.Module], fuse: bool) -> None:
    stock = make()
    model = copy.deepcopy(stock)
    state = {k: v.data_ptr() for k, v in model.state_dict().items()}
    back = normfused.revert(normfused.convert(model, fuse=fuse).model)
    assert types(back) == types(stock)
    assert {k: v.data_ptr() for k, v in back.state_dict().items()} == state
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(back.eval()(x), stock.eval()(x), rtol=0, atol=0)


def test_b24_a_copy_of_a_fused_model_reverts_too() -> None:
    torch.manual_seed(0)
    stock = MODELS["resnet18"]()
    fused = normfused.convert(copy.deepcopy(stock)).model
    back = normfused.revert(copy.deepcopy(fused))
    assert not any(isinstance(m, OURS) for m in back.modules())
    assert list(back.state_dict()) == list(stock.state_dict())
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(back(x), stock(x), rtol=0, atol=0)
    assert all(isinstance(m, OURS) for m in fused.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def test_b24_everything_stays() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4).eval())
    layers[1].weight.requires_grad_(False)
    calls = []
    layers[3].register_forward_hook(lambda *_: calls.append(1))
    model = Case(lambda m, x: m.layers(x))
    model.layers, model.shared, model.half_norm = layers, layers[1], nn.BatchNorm1d(2).to(torch.bfloat16)
    del model.a, model.b, model.hooked
    identities = {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    report = normfused.convert(model)
    converted = report.model
    assert {name: id(t) for name, t in [*converted.named_parameters(), *converted.named_buffers()]} == identities
    assert converted.layers[1] is converted.shared
    assert [converted.layers[i].training for i in (1, 3)] == [True, False]
    assert not converted.layers[1].weight.requires_grad
    assert converted.half_norm.weight.dtype == torch.bfloat16
    converted(torch.randn(2, 3, 4, 4))
    assert calls == [1]
    assert [path for path, _ in report.replaced] == ["layers.1", "layers.3", "half_norm"]
    assert [path for path, _ in report.fused] == ["layers.1"]


def test_b24_unknown_classes_are_left_alone() -> None:
    class Custom(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Custom(3), nn.ReLU(), nn.InstanceNorm2d(3), nn.LazyInstanceNorm2d())
    report = normfused.convert(model, fuse=False)
    assert [type(m) for m in model] == [Custom, nn.ReLU, nn.InstanceNorm2d, nn.LazyInstanceNorm2d]
    assert report.skipped == [
        (path, f"{kind} is not one of torch.nn's plain batch norms")
        for path, kind in [("0", "Custom"), ("2", "InstanceNorm2d"), ("3", "LazyInstanceNorm2d")]
    ]


def test_b24_saved_and_loaded_whole() -> None:
    fused = normfused.convert(MODELS["resnet18"]()).model.eval()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(x), fused(x), rtol=0, atol=0)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return F.relu(self.norm(x)) if x.sum() > 0 else self.norm(x)


def test_b25_what_cannot_be_traced_is_converted_part_by_part() -> None:
    stock = Untraceable()
    report = normfused.convert(model := copy.deepcopy(stock))
    assert report.model is model
    assert [path for path, _ in report.fused] == ["block.1"]
    ((path, reason),) = report.skipped
    assert path == "Untraceable"
    assert reason.startswith("not traced: ")
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(report.model(x), stock(x))
    assert types(normfused.revert(report.model)) == types(stock)


class Case(nn.Module):
    """A graph by its forward function."""

    def __init__(self, function: Callable[[Case, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()
        self.hooked = nn.BatchNorm2d(3)
        self.hooked.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def read_twice(m: Case, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.relu(y) + y


def changed_operand(m: Case, x: Tensor) -> Tensor:
    y = x * 2
    z = m.a(y)
    y += 1
    return torch.relu(z) + y


def changed_residual(m: Case, x: Tensor) -> Tensor:
    y = x * 2
    z = y
    z += m.a(x)
    return m.relu(z) * y


def added_to_what_the_caller_has(m: Case, x: Tensor) -> Tensor:
    x = x * 1
    y = x.view(-1)
    x += m.a(x * 3)
    return torch.relu(x) + y.view_as(x)


def residual_of_one_channel(m: Case, x: Tensor) -> Tensor:
    return torch.relu(m.a(x) + x[:, :1])


def by_mode(m: Case, x: Tensor) -> Tensor:
    return F.dropout(m.relu(m.a(x)), 0.5, m.training)


def both_normalized(m: Case, x: Tensor) -> Tensor:
    return F.leaky_relu(m.a(x) + m.b(x), 0.3)


def called_twice(m: Case, x: Tensor) -> Tensor:
    return F.elu(m.a(torch.tanh(m.a(x))), alpha=0.7)


def with_a_hook(m: Case, x: Tensor) -> Tensor:
    return torch.relu(m.hooked(x)) + F.gelu(m.a(x), approximate="tanh").sigmoid()


def added_to_a_number(m: Case, x: Tensor) -> Tensor:
    return torch.relu(m.a(x) + 1)


CASES: list[tuple[Callable[[Case, Tensor], Tensor], list[str], str | None]] = [
    (read_twice, [], "its output is read by others too"),
    (changed_operand, [], "what it reads is changed in place before"),
    (changed_residual, [], "it is added in place to something that others may read"),
    (added_to_what_the_caller_has, [], "it is added in place to something that others may read"),
    (residual_of_one_channel, ["BatchNorm2d + add + relu"], None),
    (by_mode, [], "not traced: does not do the same in training and evaluation"),
    (both_normalized, ["BatchNorm2d + add + leaky_relu"], None),
    (called_twice, ["BatchNorm2d + tanh", "BatchNorm2d + elu"], None),
    (with_a_hook, ["BatchNorm2d + gelu_tanh"], "it or what follows has hooks"),
    (added_to_a_number, [], None),
]


@pytest.mark.parametrize(("function", "fused", "skipped"), CASES, ids=[f.__name__ for f, *_ in CASES])
def test_b25_graphs(function: Callable[[Case, Tensor], Tensor], fused: list[str], skipped: str | None) -> None:
    stock = Case(function)
    report = normfused.convert(copy.deepcopy(stock))
    assert [what for _, what in report.fused] == fused
    assert [why for _, why in report.skipped] == ([skipped] if skipped else [])
    results = []
    for model in (stock, report.model):
        torch.manual_seed(1)
        x = torch.randn(4, 3, 5, 5, requires_grad=True)
        if function is changed_operand:  # for backward, torch refuses it
            x = x.detach().requires_grad_(False)
            model.requires_grad_(False)
        y = model(x)
        if y.requires_grad:
            y.square().sum().backward()
        results.append([y, x if x.grad is None else x.grad, *(t.clone() for t in model.state_dict().values())])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


class Leaky(nn.Module):
    """Layers with a leaky ReLU behind them: some of whose input nothing else reads, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(6))
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norms[0](self.convs[0](x)))
        y = self.convs[1](x)
        x = self.act(self.norms[1](y)) + y  # read twice
        x = self.act(self.norms[2](x * 2))  # of no layer
        x = F.leaky_relu(self.norms[3](self.convs[2](x)))
        x += 1  # written over
        x = self.act(self.norms[4](self.convs[3](x)) + x)  # of a sum
        return F.leaky_relu(self.norms[5](self.convs[4](x)), 0.2)


def test_b25_in_place_where_nothing_else_reads_the_input() -> None:
    stock = Leaky().double()
    report = normfused.convert(copy.deepcopy(stock), inplace=True)
    assert {path: what for path, what in report.fused} == {
        "norms.0": "BatchNorm2d + leaky_relu, in place",
        "norms.1": "BatchNorm2d + leaky_relu",
        "norms.2": "BatchNorm2d + leaky_relu",
        "norms.3": "BatchNorm2d + leaky_relu",
        "norms.4": "BatchNorm2d + add + leaky_relu",
        "norms.5": "BatchNorm2d + leaky_relu, in place",
    }
    results = []
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    for model in (stock, report.model):
        y = model(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters()), *model.buffers()])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    assert types(normfused.revert(report.model)) == types(stock)


def test_b25_kept_bytes_are_counted() -> None:
    x = torch.randn(4, 8, 6, 6)
    size = x.numel() * 4
    layers = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Sigmoid())
    assert kept_for_backward(layers, x) == 3 * size  # the input, ReLU's output, Sigmoid's output


FOLDED = [
    (nn.Linear(3, 4), nn.BatchNorm1d(4), (5, 3)),
    (nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False), (5, 3)),
    (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 8)),
    (nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), (2, 4, 8, 8)),
    (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, eps=0.1), (2, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 3, 2, groups=2), nn.BatchNorm1d(6), (2, 4, 8)),
    (nn.ConvTranspose2d(4, 4, 3, 2, groups=4, bias=False), normfused.BatchNorm2d(4), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3, affine=False), (2, 2, 3, 3, 3)),
]


@pytest.mark.parametrize(("previous", "bn", "shape"), FOLDED, ids=[repr(p).split("(")[0] for p, *_ in FOLDED])
def test_b26_folded_is_both(previous: nn.Module, bn: nn.Module, shape: tuple[int, ...]) -> None:
    previous, bn = copy.deepcopy(previous).double(), copy.deepcopy(bn).double().eval()
    with torch.no_grad():
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
        for p in bn.parameters():
            p.normal_()
    before = copy.deepcopy(previous.state_dict())
    folded = normfused.fold_bn(previous, bn)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(folded(x), bn(previous(x)), rtol=1e-12, atol=1e-12)
    assert type(folded) is type(previous)
    assert all(torch.equal(before[k], v) for k, v in previous.state_dict().items())


def test_b26_half_is_folded_in_float32() -> None:
    conv, bn = nn.Conv2d(3, 4, 1).half(), nn.BatchNorm2d(4).eval()
    bn.running_var.fill_(1e-7)
    bn.weight.data.fill_(1e-4)
    bn.eps = 0.0
    folded = normfused.fold_bn(conv, bn)
    assert folded.weight.dtype == torch.float16
    scale = 1e-4 / 1e-7**0.5
    torch.testing.assert_close(folded.weight.float(), conv.weight.float() * scale, rtol=1e-3, atol=1e-6)


BAD = [
    (
        lambda: normfused.convert(nn.BatchNorm1d(3), fuse=False, inplace=True),
        ValueError,
        "convert: inplace=True needs fuse=True, which finds where it can be",
    ),
    (lambda: normfused.convert(3), TypeError, "convert: model must be a torch.nn.Module, got int"),
    (lambda: normfused.revert("x"), TypeError, "revert: model must be a torch.nn.Module, got str"),
    (
        lambda: normfused.fold_bn(nn.ReLU(), nn.BatchNorm2d(3).eval()),
        TypeError,
        "fold_bn: previous must be a Linear, Conv or ConvTranspose, got ReLU",
    ),
    (
        lambda: normfused.fold_bn(nn.Linear(3, 3), nn.LayerNorm(3)),
        TypeError,
        "fold_bn: bn must be a batch norm, got LayerNorm",
    ),
    (
        lambda: normfused.fold_bn(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
        ValueError,
        "fold_bn: bn is in training mode, in which it depends on the batch; call eval() first",
    ),
    (
        lambda: normfused.fold_bn(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False).eval()),
        ValueError,
        "fold_bn: bn has no running statistics",
    ),
    (
        lambda: normfused.fold_bn(nn.Conv2d(3, 3, 1), normfused.BatchNormAct2d(3, activation="relu").eval()),
        ValueError,
        "fold_bn: bn has an activation, 'relu', which cannot be folded",
    ),
    (
        lambda: normfused.fold_bn(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(3).eval()),
        ValueError,
        "fold_bn: bn has 3 channels, but previous gives 4",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message[:50] for _, _, message in BAD])
def test_b10_bad_arguments(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message
