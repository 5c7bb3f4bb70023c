"""Layers of other libraries and of users: which are replaced, which are skipped, and the report."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Iterator

import pytest
import torch
from timm_like import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import normfused
from normfused.conversion import classes

pytestmark = pytest.mark.usefixtures("needs_extension", "_fresh")


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    before = dict(classes._registered)
    yield
    classes._registered.clear()
    classes._registered.update(before)


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)


def assert_same(ours: nn.Module, stock: nn.Module, x: Tensor) -> None:
    for training in (True, True, False):
        results = []
        for model in (ours, stock):
            torch.manual_seed(1)
            leaf = x.clone().requires_grad_()
            model.train(training).zero_grad()
            y = model(leaf)
            (y**3).sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


# ---- timm, torchvision, detectron2 -----------------------------------------------------------------------------------


TIMM_OPTIONS: dict[str, tuple[dict, str | None]] = {
    "relu": ({}, "relu"),
    "silu": ({"act_layer": nn.SiLU}, "silu"),
    "no activation": ({"apply_act": False}, None),
    "identity": ({"act_layer": nn.Hardswish, "drop_layer": nn.Identity}, "hardswish"),
    "disabled dropout": ({"drop_layer": lambda: nn.Dropout(0.0)}, "relu"),
    "dropout": ({"drop_layer": lambda: nn.Dropout(0.5)}, None),
    "not affine": ({"momentum": 0.3, "eps": 0.01, "affine": False}, "relu"),
}


@pytest.mark.parametrize(("options", "fused"), TIMM_OPTIONS.values(), ids=TIMM_OPTIONS.keys())
@pytest.mark.parametrize("fuse", [True, False])
def test_timm_batch_norm_act(options: dict, fused: str | None, fuse: bool) -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNormAct2d(3, **options)).double()
    ours = normfused.convert(copy.deepcopy(stock), fuse=fuse)
    layer = ours[1]
    assert isinstance(layer, (BatchNormAct2d, normfused.BatchNorm2d))
    assert isinstance(layer, BatchNormAct2d)
    assert isinstance(layer, normfused.BatchNorm2d)
    assert repr(layer) == repr(stock[1])
    report = normfused.conversion_report(ours)
    assert report.replaced == [("1", "timm.BatchNormAct2d")]
    training = ours.train()(images())
    assert training.shape == (4, 3, 6, 6)
    if fuse:
        assert report.fused.get("1") == fused
    ours = normfused.convert(copy.deepcopy(stock), fuse=fuse)
    assert_same(ours, stock, images())
    assert type(normfused.revert(ours)[1]) is BatchNormAct2d


def test_frozen_layers() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), FrozenBatchNormAct2d(3)).double()
    for name, buffer in stock[1].named_buffers():
        buffer.uniform_(0.5, 1.5) if name in ("running_var", "weight") else buffer.normal_()
    ours = normfused.convert(copy.deepcopy(stock))
    assert_same(ours, stock, images())
    assert normfused.conversion_report(ours).fused == {"1": "relu"}
    assert not ours[1].training or not list(ours[1].parameters())


def test_frozen_layers_of_mixed_precision_promote_as_before() -> None:
    stock = nn.Sequential(FrozenBatchNormAct2d(3))
    ours = normfused.convert(copy.deepcopy(stock))
    x = images(torch.bfloat16)
    assert ours(x).dtype == stock(x).dtype == torch.float32
    torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize("where", ["torchvision.ops.misc", "detectron2.layers.batch_norm"])
def test_frozen_layers_are_recognized_by_their_module(where: str) -> None:
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps = 1e-5
            for name, value in (("weight", 2.0), ("bias", 0.5), ("running_mean", 0.1), ("running_var", 1.5)):
                self.register_buffer(name, torch.full((3,), value))

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)

    FrozenBatchNorm2d.__module__, FrozenBatchNorm2d.__qualname__ = where, "FrozenBatchNorm2d"
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), FrozenBatchNorm2d(), nn.ReLU()).double()
    ours = normfused.convert(copy.deepcopy(stock))
    assert_same(ours, stock, images())
    assert normfused.conversion_report(ours).fused == {"1": "relu"}
    assert type(normfused.revert(ours)[1]) is FrozenBatchNorm2d


def test_a_known_class_name_without_its_attributes_is_not_replaced() -> None:
    stock = nn.Sequential(BatchNormAct2d(3)).double()
    del stock[0].drop
    stock[0].forward = types.MethodType(lambda self, x: x, stock[0])
    ours = normfused.convert(stock)
    assert type(ours[0]) is BatchNormAct2d
    assert normfused.conversion_report(ours).skipped == [("0", "timm.layers.norm_act.BatchNormAct2d: it has no drop")]


# ---- classes of users ------------------------------------------------------------------------------------------------


class Doubled(nn.BatchNorm2d):
    """Has a counter, and its own forward, which calls torch's."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * 2


def test_subclasses_with_their_own_forward_are_not_replaced() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), Doubled(3), nn.ReLU(), Doubled(3)).double()
    ours = normfused.convert(copy.deepcopy(stock))
    report = normfused.conversion_report(ours)
    assert report.replaced == []
    assert report.skipped == [
        ("1, 3", "test_convert_classes.Doubled is not a known class; normfused.register_conversion adds it")
    ]
    assert ours[1].calls == 0
    assert_same(ours, stock, images())
    assert ours[1].calls == 3
    assert ours[1].num_batches_tracked == 2


def test_each_unknown_class_is_named_once() -> None:
    model = nn.Sequential(*(Doubled(3) for _ in range(12)), nn.InstanceNorm2d(3))
    ((paths, why),) = normfused.conversion_report(normfused.convert(model)).skipped
    assert paths == "0, 1 and 10 more"
    assert why.startswith("test_convert_classes.Doubled is not a known class")


@pytest.mark.parametrize("fuse", [True, False])
def test_registered_subclasses_call_our_forward(fuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    normfused.register_conversion(Doubled)
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), Doubled(3), nn.ReLU()).double()
    ours = normfused.convert(copy.deepcopy(stock), fuse=fuse)
    assert isinstance(ours[1], Doubled)
    assert isinstance(ours[1], normfused.BatchNorm2d)
    assert_same(ours, stock, images())
    assert ours[1].calls == 3
    with monkeypatch.context() as m:
        m.setattr(F, "batch_norm", lambda *_: pytest.fail("torch's own was called"))
        ours(images())
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied[1]) is type(ours[1])
        torch.testing.assert_close(copied.eval()(images()), ours.eval()(images()))
    assert type(normfused.revert(ours)[1]) is Doubled


class Mine(nn.Module):
    """Not a subclass of torch's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


class MineByOurs(Mine):
    def forward(self, x: Tensor) -> Tensor:
        return normfused.functional.batch_norm(x, self.running_mean, self.running_var, training=self.training)


def test_registered_with_a_target() -> None:
    normfused.register_conversion(Mine, MineByOurs)
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), Mine(), nn.ReLU()).double()
    ours = normfused.convert(copy.deepcopy(stock))
    assert type(ours[1]) is MineByOurs
    assert_same(ours, stock, images())
    assert normfused.conversion_report(ours).fused == {"1": "relu"}
    assert type(normfused.revert(ours)[1]) is Mine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), r"register_conversion: source must be a subclass of torch\.nn\.Module, got 3"),
        ((Mine,), r"register_conversion: Mine needs a target, because it is not a subclass of torch"),
        ((Mine, nn.ReLU()), r"register_conversion: target must be a subclass of torch\.nn\.Module, got ReLU\(\)"),
        ((nn.BatchNorm2d,), r"register_conversion: BatchNorm2d needs a target, because"),
        ((normfused.BatchNorm2d,), r"register_conversion: BatchNorm2d needs a target, because"),
    ],
)
def test_bad_registrations_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        normfused.register_conversion(*arguments)


# ---- instances of torch's layers that were changed -------------------------------------------------------------------


def test_a_layer_with_a_replaced_forward_is_not_converted() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    model[0].forward = types.MethodType(lambda self, x: x + 1, model[0])
    normfused.convert(model)
    assert type(model[0]) is nn.BatchNorm2d
    x = images(torch.float32)
    torch.testing.assert_close(model(x), F.relu(x + 1))
    (skipped,) = normfused.conversion_report(model).skipped
    assert skipped == ("0", "torch.nn.modules.batchnorm.BatchNorm2d: its forward is replaced on the layer itself")


def test_parametrized_layers_are_not_replaced() -> None:
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs() + 1

    stock = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).double()
    parametrize.register_parametrization(stock[1], "weight", Positive())
    ours = normfused.convert(copy.deepcopy(stock))
    assert_same(ours, stock, images())
    ((path, why),) = normfused.conversion_report(ours).skipped
    assert path == "1"
    assert "ParametrizedBatchNorm2d is not a known class" in why
