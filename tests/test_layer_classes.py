"""Constructors and classes of the layers, and the errors for code that supports only torch.nn's."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.utils.mkldnn
from torch import Tensor, nn
from torch.nn.utils import fusion

import normfused

PAIRS = [
    (normfused.BatchNorm1d, nn.BatchNorm1d),
    (normfused.BatchNorm2d, nn.BatchNorm2d),
    (normfused.BatchNorm3d, nn.BatchNorm3d),
    (normfused.SyncBatchNorm, nn.SyncBatchNorm),
    (normfused.LazyBatchNorm1d, nn.LazyBatchNorm1d),
    (normfused.LazyBatchNorm2d, nn.LazyBatchNorm2d),
    (normfused.LazyBatchNorm3d, nn.LazyBatchNorm3d),
    (normfused.LocalResponseNorm, nn.LocalResponseNorm),
]
WITH_ACTIVATION = [normfused.BatchNormAct1d, normfused.BatchNormAct2d, normfused.BatchNormAct3d]
SHAPES = {"1d": (5, 4, 6), "2d": (5, 4, 3, 6), "3d": (5, 4, 3, 2, 6)}


def shape_of(cls: type) -> tuple[int, ...]:
    return SHAPES[cls.__name__[-2:]]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=[ours.__name__ for ours, _ in PAIRS])
def test_signatures_begin_like_those_of_torch(ours: type, theirs: type) -> None:
    mine, stock = (inspect.signature(cls).parameters for cls in (ours, theirs))
    positional = [p for p in stock.values() if p.kind is not p.KEYWORD_ONLY]
    assert [(p.name, p.default, p.kind) for p in mine.values()][: len(positional)] == [
        (p.name, p.default, p.kind) for p in positional
    ]
    assert {p.name for p in stock.values()} <= set(mine)
    assert all(p.kind is p.KEYWORD_ONLY for p in list(mine.values())[len(positional) :])


@pytest.mark.parametrize("cls", [*(ours for ours, _ in PAIRS[:4]), *WITH_ACTIVATION, normfused.SyncBatchNormAct])
def test_skip_init(cls: type) -> None:
    layer = torch.nn.utils.skip_init(cls, 7, bias=False)
    assert (layer.num_features, layer.weight.shape, layer.bias, layer.weight.device.type) == (7, (7,), None, "cpu")


def test_a_factory_that_looks_at_signatures() -> None:
    """Like MONAI's ``get_norm_layer``, which passes the channels to layers whose signature has ``num_features``."""
    for cls in (normfused.BatchNorm2d, normfused.BatchNormAct2d):
        name, arguments = cls, {}
        if "num_features" in inspect.signature(name).parameters:
            arguments["num_features"] = 6
        assert name(**arguments, eps=1e-3).num_features == 6


@pytest.mark.parametrize("cls", WITH_ACTIVATION)
def test_layers_with_an_activation(cls: type) -> None:
    layer, plain = cls(4, "silu", eps=1e-3), getattr(nn, cls.__name__.replace("Act", ""))(4, eps=1e-3)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape_of(cls))
    torch.testing.assert_close(layer(x), nn.functional.silu(plain(x)))
    torch.testing.assert_close(layer(x, x), nn.functional.silu(plain(x) + x))
    for a, e in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, e)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is cls
        assert repr(other) == repr(layer)
        torch.testing.assert_close(other.eval()(x), copy.deepcopy(layer).eval()(x), rtol=0, atol=0)
    assert "activation='silu'" in repr(layer)
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: expected a .* input, got"):
        layer(x[..., None, None])


def test_the_default_activation_is_relu_and_identity_is_none() -> None:
    x = torch.randn(5, 3)
    assert normfused.BatchNormAct1d(3)(x).min() == 0
    for identity in ("identity", None):
        layer = normfused.BatchNormAct1d(3, identity)
        torch.testing.assert_close(layer(x), nn.BatchNorm1d(3)(x))
        assert layer.eps == 1e-5  # readable: no option would be lost


@pytest.mark.parametrize("cls", [normfused.BatchNorm2d, normfused.SyncBatchNorm, normfused.LazyBatchNorm2d])
def test_subclasses_of_torchs_layers_have_no_activation(cls: type) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'activation'"):
        cls(3, activation="relu")


LOSING: dict[str, Any] = {
    "activation='relu'": lambda: normfused.BatchNormAct2d(4),
    "activation='elu', activation_param=0.5": lambda: normfused.BatchNormAct2d(4, "elu", 0.5),
    "running_var_correction=0": lambda: normfused.BatchNorm2d(4, running_var_correction=0),
    "nonfinite='skip'": lambda: normfused.BatchNorm2d(4, nonfinite="skip"),
    "frozen=True": lambda: normfused.BatchNorm2d(4).freeze(),
}
CONVERTERS: dict[str, Any] = {
    "SyncBatchNorm": lambda bn: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(bn)),
    "fuse_conv_bn_eval": lambda bn: fusion.fuse_conv_bn_eval(nn.Conv2d(3, 4, 1).eval(), bn.eval()),
    "fuse_linear_bn_eval": lambda bn: fusion.fuse_linear_bn_eval(nn.Linear(3, 4).eval(), bn.eval()),
    "a rebuilt layer": lambda bn: nn.GroupNorm(2, bn.num_features, bn.eps),
    "folding by attributes": lambda bn: bn.weight / (bn.running_var + bn.eps).sqrt(),
}


@pytest.mark.parametrize("converter", list(CONVERTERS))
@pytest.mark.parametrize("option", list(LOSING))
def test_converters_that_would_lose_an_option_are_stopped(option: str, converter: str) -> None:
    layer = LOSING[option]()
    with pytest.raises(AttributeError) as error:
        CONVERTERS[converter](layer)
    assert str(error.value) == (
        f"{type(layer).__name__}: eps cannot be read, because code that folds or rebuilds the layer by its attributes "
        f"would lose {option}; use normfused.convert_sync_batchnorm or normfused.fold_bn instead, or read layer.epsilon"
    )


def test_layers_without_options_are_converted_like_torchs() -> None:
    for layer in (normfused.BatchNorm2d(4), normfused.BatchNorm2d(4, inplace=True), normfused.BatchNormAct2d(4, None)):
        for convert in CONVERTERS.values():
            convert(layer)


def test_mkldnn_preserves_or_refuses_options() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), normfused.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 6, 6)
    converted = torch.utils.mkldnn.to_mkldnn(copy.deepcopy(plain))
    torch.testing.assert_close(converted(x.to_mkldnn()).to_dense(), plain(x))
    frozen = nn.Sequential(normfused.BatchNorm2d(4).freeze())
    with pytest.raises(AttributeError, match="would lose frozen=True"):
        torch.utils.mkldnn.to_mkldnn(frozen)
    # torch's function converts only BatchNorm2d: other layers keep their class, and so their activation.
    unconverted = torch.utils.mkldnn.to_mkldnn(nn.Sequential(normfused.BatchNormAct2d(4)).eval())
    assert isinstance(unconverted[0], normfused.BatchNormAct2d)


def replace_by_group_norm(model: nn.Module) -> nn.Module:
    """Replaces layers by their class, as Opacus' ``ModuleValidator.fix`` does."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, nn.GroupNorm(2, child.num_features))
        else:
            replace_by_group_norm(child)
    return model


def test_code_that_looks_for_batchnorm2d_skips_layers_with_an_activation() -> None:
    model = nn.Sequential(normfused.BatchNorm2d(4), normfused.BatchNormAct2d(4))
    assert [type(m) for m in replace_by_group_norm(model)] == [nn.GroupNorm, normfused.BatchNormAct2d]


@pytest.mark.parametrize("option", list(LOSING))
def test_a_hidden_eps_behaves_like_a_missing_attribute(option: str) -> None:
    layer = LOSING[option]()
    assert not hasattr(layer, "eps")
    assert getattr(layer, "eps", 7) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inspect.getmembers(layer)
    layer.eps = 1e-3
    assert layer.epsilon == 1e-3
    assert "eps=0.001" in repr(layer)
    stock = nn.BatchNorm2d(4, eps=1e-3).eval()
    x = torch.randn(2, 4, 3, 3) + 1
    want = stock(x)
    if layer.activation is not None:
        want = {"relu": nn.functional.relu, "elu": lambda z: nn.functional.elu(z, 0.5)}[layer.activation](want)
    torch.testing.assert_close(layer.eval()(x), want)
    assert copy.deepcopy(layer).epsilon == pickle.loads(pickle.dumps(layer)).epsilon == 1e-3


def test_frozen_statistics_survive_a_reset() -> None:
    """``torch.optim.swa_utils.update_bn`` resets statistics, and expects training forward passes to recompute them."""
    layer = normfused.BatchNorm2d(3)
    layer(torch.randn(4, 3, 5, 5) + 1)
    mean = layer.freeze().running_mean.clone()
    torch.optim.swa_utils.update_bn([torch.randn(4, 3, 5, 5)], layer)
    torch.testing.assert_close(layer.running_mean, mean, rtol=0, atol=0)
    layer.reset_parameters()  # reinitializes the layer, including its statistics
    assert not layer.running_mean.any()
    torch.func.replace_all_batch_norm_modules_(layer)
    with pytest.raises(ValueError, match="BatchNorm2d: the layer is frozen, but its running statistics are gone"):
        layer(torch.randn(4, 3, 5, 5))


def test_attributes_are_those_of_torchs_layers() -> None:
    ours, theirs = normfused.BatchNorm2d(4), nn.BatchNorm2d(4)
    assert set(vars(ours)) == set(vars(theirs))
    assert ours.eps == theirs.eps
    for name in ("qconfig", "nonsense"):
        assert not hasattr(ours, name)
        with pytest.raises(AttributeError, match=rf"^'BatchNorm2d' object has no attribute '{name}'$"):
            getattr(ours, name)
    ours.qconfig = None
    del ours.qconfig
    assert not hasattr(ours, "qconfig")
    assert dict(inspect.getmembers(ours))["eps"] == 1e-5


@pytest.mark.parametrize("cls", [normfused.BatchNorm2d, normfused.BatchNormAct2d, normfused.SyncBatchNorm])
def test_a_check_of_the_input_that_a_subclass_overrides(cls: type) -> None:
    seen: list[int] = []

    class Mine(cls):  # type: ignore[misc, valid-type]
        def _check_input_dim(self, input: Tensor) -> None:
            seen.append(input.dim())
            if input.dim() == 5:
                raise ValueError("no volumes")

    layer = Mine(3).eval()
    assert layer(torch.randn(2, 3, 4)).shape == (2, 3, 4)  # the subclass's check replaces ours for 2d
    layer(torch.randn(2, 3, 4, 4))
    assert seen == [3, 4]
    with pytest.raises(ValueError, match=r"^no volumes$"):
        layer(torch.randn(2, 3, 4, 4, 4))

    class Further(Mine):
        pass

    Further(3).eval()(torch.randn(2, 3, 4))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("cls", "becomes"),
    [(getattr(normfused, f"Lazy{n}"), getattr(normfused, n)) for n in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")],
)
def test_lazy_layers(cls: type, becomes: type) -> None:
    stock = getattr(nn, cls.__name__)(eps=1e-3)
    layer = cls(eps=1e-3)
    assert isinstance(layer, type(stock))
    x = torch.randn(shape_of(cls))
    for _ in range(2):
        torch.testing.assert_close(layer(x), stock(x))
    assert type(layer) is becomes
    assert set(vars(layer)) == set(vars(stock))
    for a, e in zip(layer.state_dict().values(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(a, e)


def test_lazy_layers_with_options() -> None:
    layer = normfused.LazyBatchNorm2d(nonfinite="skip", bias=False, inplace=True)
    x = torch.full((2, 3, 4, 4), torch.inf)
    with torch.no_grad():
        assert layer(x) is x
    assert (layer.nonfinite_batches.tolist(), layer.bias) == ([1, 1, 1], None)
    with pytest.raises(ValueError, match=r"^LazyBatchNorm1d: running_var_correction must be 0 or 1, got 2$"):
        normfused.LazyBatchNorm1d(running_var_correction=2)


@pytest.mark.parametrize("fuse", [True, False])
def test_convert_replaces_lazy_layers(fuse: bool) -> None:
    def made() -> nn.Sequential:
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())

    model = made()
    normfused.convert(model, fuse=fuse)
    assert type(model[1]) is normfused.LazyBatchNorm2d
    assert normfused.conversion_report(model).replaced == [("1", "torch.nn.LazyBatchNorm2d")]
    x = torch.randn(2, 3, 6, 6)
    torch.manual_seed(1)
    got = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, made()(x))
    assert type(model[1]) is normfused.BatchNorm2d
    back = normfused.revert(normfused.convert(made(), fuse=fuse))
    assert type(back[1]) is nn.LazyBatchNorm2d
