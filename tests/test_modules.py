"""The modules are drop-in replacements for torch.nn's."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import assert_same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normfused

PAIRS = [
    (normfused.BatchNorm1d, nn.BatchNorm1d, (6, 4, 5)),
    (normfused.BatchNorm2d, nn.BatchNorm2d, (6, 4, 3, 5)),
    (normfused.BatchNorm3d, nn.BatchNorm3d, (3, 4, 2, 3, 5)),
]
no_bias = pytest.param(
    {"bias": False},
    id="{'bias': False}",
    marks=pytest.mark.skipif(
        "bias" not in inspect.signature(nn.BatchNorm2d).parameters,
        reason=f"BatchNorm2d of torch {torch.__version__} has no argument bias",
    ),
)
pairs = pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS, ids=["1d", "2d", "3d"])


def trained(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The module, after all parameters and buffers were changed from their initial values."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.5, 1.5)
    parameter = next(module.parameters())
    module(torch.randn(shape, device=parameter.device, dtype=parameter.dtype) + 1)
    return module


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    for name, value in a.state_dict().items():
        assert_same_bits(value, b.state_dict()[name])


@pairs
def test_subclasses(device: torch.device, ours: type, theirs: type, shape: tuple[int, ...]) -> None:
    module = ours(4, device=device)
    assert isinstance(module, theirs)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert repr(module) == repr(theirs(4, device=device))
    assert module(torch.randn(shape, device=device)).shape == shape


@pairs
def test_state_dict_both_ways(device: torch.device, ours: type, theirs: type, shape: tuple[int, ...]) -> None:
    for source, target in ((ours, theirs), (theirs, ours)):
        a, b = trained(source(4, device=device), shape), target(4, device=device)
        b.load_state_dict(a.state_dict(), strict=True)
        assert_same_state(a, b)
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(b.eval()(x), a.eval()(x))


@pytest.mark.parametrize("arguments", [{"affine": False}, {"track_running_stats": False}, no_bias], ids=str)
def test_state_dict_keys_of_every_kind(device: torch.device, arguments: dict[str, bool]) -> None:
    ours = normfused.BatchNorm2d(4, device=device, **arguments)
    theirs = nn.BatchNorm2d(4, device=device, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_state(ours, theirs)


def save_and_load(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(nn.Sequential(module), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)[0]


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load],
    ids=["deepcopy", "pickle", "save"],
)
@pairs
def test_copies(device: torch.device, ours: type, theirs: type, shape: tuple[int, ...], copied) -> None:
    module = trained(ours(4, eps=1e-3, momentum=0.2, device=device), shape)
    other = copied(module)
    assert type(other) is ours
    assert repr(other) == repr(module)
    assert_same_state(module, other)
    x = torch.randn(shape, device=device)
    assert_same_bits(other(x), module(x))
    assert_same_state(module, other)
    other(x)  # must not change the original
    assert module.num_batches_tracked == 2
    assert other.num_batches_tracked == 3


def test_hooks(device: torch.device) -> None:
    module = normfused.BatchNorm1d(3, device=device)
    seen: list[str] = []
    module.register_forward_pre_hook(lambda m, args: (seen.append("pre"), (args[0] * 2,))[1])
    module.register_forward_hook(lambda m, args, y: (seen.append("post"), y + 1)[1])
    module.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    x = torch.randn(5, 3, device=device, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert seen == ["pre", "post", "backward"]
    torch.testing.assert_close(y, nn.BatchNorm1d(3, device=device)(x * 2) + 1)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_fx(device: torch.device, training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), normfused.BatchNorm2d(4), nn.ReLU()).to(device).train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    inlined = torch.fx.symbolic_trace(copy.deepcopy(model[1]))
    x = torch.randn(2, 3, 8, 8, device=device)
    assert_same_bits(traced(x), model(x))
    for name, value in traced.state_dict().items():
        assert_same_bits(value, model.state_dict()[name])
    h = torch.randn(2, 4, 8, 8, device=device)
    assert_same_bits(inlined(h), model[1](h))


def test_fx_follows_train_and_eval(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(normfused.BatchNorm1d(3)), normfused.BatchNorm1d(3)).to(device)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    x = torch.randn(5, 3, device=device)
    for training in (True, False, True):
        assert_same_bits(traced.train(training)(x), model.train(training)(x))
    assert_same_state(traced, model)


def test_fx_traces_into_the_module(device: torch.device) -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return False

    module = normfused.BatchNorm2d(4, device=device)
    root = copy.deepcopy(module)
    graph = torch.fx.GraphModule(root, Tracer().trace(root))
    x = torch.randn(2, 4, 3, 3, device=device)
    assert_same_bits(graph(x), module(x))
    assert_same_bits(graph.running_var, module.running_var)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


# A layer of each family, of normfused or torch.nn, for an input of shape (5, 4, 3).
FAMILIES: dict[str, Callable[[Any], nn.Module]] = {
    "batch": lambda library: library.BatchNorm1d(4),
    "group": lambda library: library.GroupNorm(2, 4),
    "instance": lambda library: library.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "layer": lambda library: library.LayerNorm(3),
    "rms": lambda library: library.RMSNorm(3),
}


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_parametrizations(make: Callable[[Any], nn.Module], device: torch.device) -> None:
    module, theirs = (make(library).to(device).double() for library in (normfused, nn))
    for m in (module, theirs):
        parametrize.register_parametrization(m, "weight", Doubled())
    assert isinstance(module, type(make(normfused)))
    x = torch.randn(5, 4, 3, device=device, dtype=torch.float64)
    y, expected = module(x), theirs(x)
    torch.testing.assert_close(y, expected)
    for output in (y, expected):
        (output**3).sum().backward()
    original = [m.parametrizations.weight.original.grad for m in (module, theirs)]
    torch.testing.assert_close(*original)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_a_tensor_that_replaces_a_parameter_or_buffer_as_a_plain_attribute_is_used(
    make: Callable[[Any], nn.Module], training: bool, device: torch.device
) -> None:
    module, theirs = (make(library).to(device).train(training) for library in (normfused, nn))
    for name, value in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
        plain = torch.rand_like(value) + 1 if value.is_floating_point() else value.clone()
        for m in (module, theirs):
            delattr(m, name)
            setattr(m, name, plain.clone())
    x = torch.randn(5, 4, 3, device=device)
    torch.testing.assert_close(module(x), theirs(x))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(module, name, None), getattr(theirs, name, None))


def with_property(base: type[nn.Module]) -> type[nn.Module]:
    return type("Own", (base,), {"weight": property(lambda self: 2 * self._parameters["weight"])})


def with_getattr(base: type[nn.Module]) -> type[nn.Module]:
    def read(self: nn.Module, name: str) -> Any:
        value = base.__getattr__(self, name)
        return 2 * value if name == "weight" else value

    return type("Own", (base,), {"__getattr__": read})


@pytest.mark.parametrize("subclass", [with_property, with_getattr])
@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_a_subclass_that_computes_its_weight_is_read_as_torch_reads_it(
    make: Callable[[Any], nn.Module], subclass: Callable[[type[nn.Module]], type[nn.Module]], device: torch.device
) -> None:
    x = torch.randn(5, 4, 3, device=device)
    plain = make(nn).to(device)
    with torch.no_grad():
        plain.weight.mul_(2)
    outputs = []
    for library in (normfused, nn):
        module = make(library).to(device)
        module.__class__ = subclass(type(module))
        outputs.append(module(x))
        assert torch.equal(module.weight, plain.weight)
    torch.testing.assert_close(outputs, [plain(x)] * 2)


def test_shared_and_frozen_parameters(device: torch.device) -> None:
    module = normfused.BatchNorm1d(3, device=device)
    module.weight.requires_grad_(False)
    x = torch.randn(5, 3, device=device)
    module(x).sum().backward()
    assert module.weight.grad is None
    assert module.bias.grad is not None
    torch.testing.assert_close(module.bias.grad, torch.full_like(module.bias, 5))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("buffers", [True, False], ids=["buffers", "none"])
@pytest.mark.parametrize("track", [True, False], ids=["track", "no track"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pairs
def test_truth_table(
    device: torch.device,
    ours: type,
    theirs: type,
    shape: tuple[int, ...],
    training: bool,
    track: bool,
    buffers: bool,
    affine: bool,
) -> None:
    a, b = (cls(4, affine=affine, device=device, dtype=torch.float64) for cls in (ours, theirs))
    if affine:
        trained(b, shape)
    a.load_state_dict(b.state_dict())
    values = torch.randn(shape, device=device, dtype=torch.float64)
    grad_output = torch.randn_like(values)
    results = []
    for module in (a, b):
        module.train(training)
        module.track_running_stats = track
        if not buffers:
            module.running_mean = module.running_var = None
        x = values.clone().requires_grad_()
        y = module(x)
        y.backward(grad_output)
        buffers_after = [module.running_mean, module.running_var, module.num_batches_tracked]
        results.append([y, x.grad, *(p.grad for p in module.parameters()), *buffers_after])
    for got, expected in zip(*results, strict=True):
        if expected is None:
            assert got is None
        else:
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_only_one_buffer(device: torch.device, missing: str, training: bool) -> None:
    module = normfused.BatchNorm1d(3, device=device).train(training)
    setattr(module, missing, None)
    given = "running_var" if missing == "running_mean" else "running_mean"
    with pytest.raises(ValueError, match="must be given together") as error:
        module(torch.randn(4, 3, device=device))
    assert str(error.value) == (f"batch_norm: running_mean and running_var must be given together, got only {given}")
    assert module.num_batches_tracked == 0


SINGLE = [
    (normfused.BatchNorm1d, (1, 4)),
    (normfused.BatchNorm1d, (1, 4, 1)),
    (normfused.BatchNorm2d, (1, 4, 1, 1)),
    (normfused.BatchNorm3d, (1, 4, 1, 1, 1)),
    (normfused.BatchNorm1d, (1, 1)),
]


@pytest.mark.parametrize(("cls", "shape"), SINGLE, ids=str)
def test_one_value_per_channel(device: torch.device, cls: type, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=device)
    for arguments in ({}, {"momentum": None}, {"affine": False}):
        module = cls(shape[1], device=device, **arguments)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        with pytest.raises(ValueError, match="more than 1 value") as error:
            module(x)
        assert str(error.value) == (
            f"{cls.__name__}: expected more than 1 value per channel when training, got input of shape {shape}; "
            "use a bigger batch, put the module in eval mode, or drop the last incomplete batch "
            "(DataLoader(drop_last=True))"
        )
        for name, value in module.state_dict().items():
            assert_same_bits(value, before[name])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("cls", "shape"), SINGLE, ids=str)
def test_one_value_per_channel_without_buffers(
    device: torch.device, cls: type, shape: tuple[int, ...], training: bool
) -> None:
    module = cls(shape[1], device=device, track_running_stats=False).train(training)
    with pytest.raises(ValueError, match="more than 1 value") as error:
        module(torch.randn(shape, device=device))
    assert str(error.value) == (
        f"{cls.__name__}: expected more than 1 value per channel without running statistics, got input of shape "
        f"{shape}; use a bigger batch, keep running statistics, or drop the last incomplete batch "
        "(DataLoader(drop_last=True))"
    )


def test_cumulative_average_without_a_counter_changes_nothing(device: torch.device) -> None:
    ours, theirs = (cls(3, momentum=None, device=device) for cls in (normfused.BatchNorm1d, nn.BatchNorm1d))
    x = torch.randn(8, 3, device=device)
    for module in (ours, theirs):
        module.num_batches_tracked = None
        module(x)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert torch.equal(ours.running_mean, torch.zeros(3, device=device))


@pytest.mark.parametrize(("cls", "shape"), SINGLE, ids=str)
def test_one_value_in_eval(device: torch.device, cls: type, shape: tuple[int, ...]) -> None:
    module = cls(shape[1], device=device).eval()
    x = torch.randn(shape, device=device)
    torch.testing.assert_close(module(x), x / (1 + 1e-5) ** 0.5)


def test_errors_name_the_subclass(device: torch.device) -> None:
    class MyNorm(normfused.BatchNorm1d):
        pass

    with pytest.raises(ValueError, match=r"^MyNorm: expected more than 1 value per channel when training"):
        MyNorm(3, device=device)(torch.randn(1, 3, device=device))


@pytest.mark.parametrize(
    "arguments",
    [
        no_bias,
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"eps": 0.5},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
@pairs
def test_constructor_arguments(
    device: torch.device, ours: type, theirs: type, shape: tuple[int, ...], arguments: dict[str, object]
) -> None:
    a, b = (cls(4, device=device, dtype=torch.float64, **arguments) for cls in (ours, theirs))
    assert a.extra_repr() == b.extra_repr()
    assert repr(a) == repr(b)
    for training in (True, True, False):
        values = torch.randn(shape, device=device, dtype=torch.float64) * 2 + 1
        inputs = [values.clone().requires_grad_() for _ in range(2)]
        outputs = [m.train(training)(x) for m, x in zip((a, b), inputs, strict=True)]
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
        for y in outputs:
            (y**3).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-10)
    for (name, value), expected in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, msg=name)
    for p, q in itertools.zip_longest(a.parameters(), b.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pairs
def test_device_and_dtype(
    device: torch.device, ours: type, theirs: type, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    module = ours(4, device=device, dtype=dtype)
    for name, value in module.state_dict().items():
        assert value.device.type == device.type
        assert value.dtype == (torch.int64 if name == "num_batches_tracked" else dtype)
    x = torch.randn(shape, device=device, dtype=dtype)
    assert module(x).dtype == dtype
    moved = module.to(torch.float64)
    assert moved(x.double()).dtype == torch.float64
    assert moved.num_batches_tracked == 2


def test_meta_device() -> None:
    module = normfused.BatchNorm2d(4, device="meta")
    assert module.weight.is_meta
    assert module(torch.empty(2, 4, 3, 3, device="meta")).shape == (2, 4, 3, 3)
    real = module.to_empty(device="cpu")
    real.reset_parameters()
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(real(x), nn.BatchNorm2d(4)(x))
