"""Batch norm folded into the layer before it: correct, or an error that leaves both layers unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import normfused


def randomized(bn: Any) -> Any:
    bn = copy.deepcopy(bn).eval()
    with torch.no_grad():
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
        for parameter in bn.parameters():
            parameter.normal_()
    return bn


FOLDED = [
    (nn.Linear(3, 4), nn.BatchNorm1d(4), (5, 3)),
    (nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False), (5, 3)),
    (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 8)),
    (nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), (2, 4, 8, 8)),
    (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), (2, 2, 8, 8)),
    (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, eps=0.1), (2, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 3, 2, groups=2), nn.BatchNorm1d(6), (2, 4, 8)),
    (nn.ConvTranspose2d(4, 4, 3, 2, groups=4, bias=False), normfused.BatchNorm2d(4), (2, 4, 5, 5)),
    (nn.ConvTranspose2d(4, 12, 3, 2, groups=2), normfused.BatchNormAct2d(12, activation="identity"), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3, affine=False), (2, 2, 3, 3, 3)),
    (nn.Conv1d(4, 6, 3), normfused.BatchNorm1d(6, nonfinite="skip", running_var_correction=0), (2, 4, 8)),
    (nn.Conv3d(2, 3, 2), normfused.BatchNorm3d(3, inplace=True), (2, 2, 4, 4, 4)),
    (nn.Conv2d(2, 3, 2), normfused.SyncBatchNorm(3), (2, 2, 4, 4)),
    (nn.Linear(3, 4), normfused.BatchNorm1d(4).freeze(), (5, 3)),
]


@pytest.mark.parametrize(("previous", "bn", "shape"), FOLDED, ids=[f"{p}-{b}".replace(" ", "") for p, b, _ in FOLDED])
def test_the_folded_layer_equals_both_layers_together(
    previous: nn.Module, bn: nn.Module, shape: tuple[int, ...]
) -> None:
    previous, bn = copy.deepcopy(previous).double(), randomized(bn).double()
    states = [copy.deepcopy(module.state_dict()) for module in (previous, bn)]
    folded = normfused.fold_bn(previous, bn)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(folded(x), bn(previous(x)), rtol=1e-12, atol=1e-12)
    assert type(folded) is type(previous)
    for module, state in zip((previous, bn), states, strict=True):
        assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())


def test_torchs_synchronized_layer_is_folded() -> None:
    conv, bn = nn.Conv2d(2, 3, 2), randomized(nn.SyncBatchNorm(3))
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(normfused.fold_bn(conv, bn)(x), bn(conv(x)), rtol=1e-5, atol=1e-5)


def test_half_is_folded_in_float32() -> None:
    conv, bn = nn.Conv2d(3, 4, 1).half(), nn.BatchNorm2d(4).eval()
    bn.running_var.fill_(1e-7)
    bn.weight.data.fill_(1e-4)
    bn.eps = 0.0
    folded = normfused.fold_bn(conv, bn)
    assert folded.weight.dtype == folded.bias.dtype == torch.float16
    scale = 1e-4 / 1e-7**0.5
    torch.testing.assert_close(folded.weight.float(), conv.weight.float() * scale, rtol=1e-3, atol=1e-6)


def test_a_wider_batch_norm_is_folded_in_its_own_dtype() -> None:
    """The mean and the bias cancel to 1 in float64, and to 0 in float32."""
    linear, bn = nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0).double().eval()
    linear.bias.data.fill_(2.0**30)
    bn.running_mean.fill_(2.0**30 - 1)
    assert normfused.fold_bn(linear, bn).bias.item() == 1


def test_requires_grad_is_preserved() -> None:
    for learns in (True, False):
        linear = nn.Linear(2, 3, bias=False).requires_grad_(learns)
        folded = normfused.fold_bn(linear, nn.BatchNorm1d(3).eval())
        assert [p.requires_grad for p in folded.parameters()] == [learns, learns]


def test_one_batch_norm_behind_two_layers_is_folded_into_each() -> None:
    first, second, bn = nn.Conv1d(2, 3, 1), nn.Conv1d(2, 3, 1), randomized(nn.BatchNorm1d(3))
    x = torch.randn(4, 2, 5)
    for conv in (first, second):
        torch.testing.assert_close(normfused.fold_bn(conv, bn)(x), bn(conv(x)), rtol=1e-5, atol=1e-5)


# ---- refused ---------------------------------------------------------------------------------------------------------


class DoubledConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class ShiftedOwnNorm(normfused.BatchNorm2d):
    def forward(self, input: Tensor, *others: Any) -> Tensor:
        return super().forward(input, *others) + 1


class Wrapper(Tensor):
    """A subclass of Tensor, as DTensor is."""


def conv() -> Any:
    return nn.Conv2d(3, 3, 1)


def norm() -> Any:
    return nn.BatchNorm2d(3).eval()


def changed(module: Any, change: Callable[[Any], object]) -> Any:
    change(module)
    return module


def with_hook(module: Any, kind: str) -> Any:
    getattr(module, f"register_{kind}")(lambda *_: None)
    return module


def pruned(module: Any) -> Any:
    return prune.l1_unstructured(module, "weight", 0.5)


def with_forward(module: Any) -> Any:
    original = module.forward
    module.forward = lambda x: original(x) + 1
    return module


def with_weight(module: Any, weight: Tensor) -> Any:
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


EXACTLY = "must be exactly a"
BAD: list[tuple[str, Callable[[], tuple[Any, Any]], type[Exception], str]] = [
    ("no layer", lambda: (nn.ReLU(), norm()), TypeError, f"previous {EXACTLY} .*, got ReLU"),
    ("no module", lambda: (3, norm()), TypeError, f"previous {EXACTLY} .*, got int"),
    ("no norm", lambda: (conv(), nn.LayerNorm(3)), TypeError, f"bn {EXACTLY} .*, got LayerNorm"),
    ("instance norm", lambda: (conv(), nn.InstanceNorm2d(3).eval()), TypeError, f"bn {EXACTLY} .*, got InstanceNorm2d"),
    ("conv subclass", lambda: (DoubledConv(3, 3, 1), norm()), TypeError, f"previous {EXACTLY} .*, got DoubledConv"),
    ("norm subclass", lambda: (conv(), ShiftedNorm(3).eval()), TypeError, f"bn {EXACTLY} .*, got ShiftedNorm"),
    ("own subclass", lambda: (conv(), ShiftedOwnNorm(3).eval()), TypeError, f"bn {EXACTLY} .*, got ShiftedOwnNorm"),
    ("lazy conv", lambda: (nn.LazyConv2d(3, 1), norm()), TypeError, f"previous {EXACTLY} .*, got LazyConv2d"),
    ("lazy norm", lambda: (conv(), nn.LazyBatchNorm2d().eval()), TypeError, f"bn {EXACTLY} .*, got LazyBatchNorm2d"),
    (
        "quantizable",
        lambda: (torch.ao.nn.qat.Linear(3, 3, qconfig=torch.ao.quantization.default_qat_qconfig), norm()),
        TypeError,
        f"previous {EXACTLY} .*, got Linear",
    ),
    ("training", lambda: (conv(), nn.BatchNorm2d(3)), ValueError, "bn is in training mode, .* call eval\\(\\) first"),
    (
        "no statistics",
        lambda: (conv(), nn.BatchNorm2d(3, track_running_stats=False).eval()),
        ValueError,
        "bn has no running statistics",
    ),
    (
        "activation",
        lambda: (conv(), normfused.BatchNormAct2d(3, activation="relu").eval()),
        ValueError,
        "bn has an activation, 'relu', which cannot be folded",
    ),
    (
        "channels",
        lambda: (nn.Conv2d(3, 4, 1), norm()),
        ValueError,
        "bn.running_mean has shape \\(3,\\), but previous has 4 output channels",
    ),
    (
        "channels of groups",
        lambda: (nn.ConvTranspose2d(4, 6, 1, groups=2), norm()),
        ValueError,
        "bn.running_mean has shape \\(3,\\), but previous has 6 output channels",
    ),
    (
        "dimensions",
        lambda: (nn.Linear(3, 3), norm()),
        ValueError,
        "bn is BatchNorm2d, which does not accept the 2D output of Linear",
    ),
    (
        "more dimensions",
        lambda: (conv(), normfused.BatchNorm1d(3).eval()),
        ValueError,
        "bn is BatchNorm1d, which does not accept the 4D output of Conv2d",
    ),
    *(
        (f"{kind} of {name}", make, ValueError, f"{name} has hooks, .*lambda")
        for kind in ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook")
        for name, make in (
            ("previous", lambda kind=kind: (with_hook(conv(), kind), norm())),
            ("bn", lambda kind=kind: (conv(), with_hook(norm(), kind))),
        )
    ),
    ("weight_norm", lambda: (weight_norm(conv()), norm()), ValueError, "previous has hooks, .*WeightNorm"),
    ("spectral_norm", lambda: (spectral_norm(conv()), norm()), ValueError, "previous has hooks, .*SpectralNorm"),
    ("pruned", lambda: (pruned(conv()), norm()), ValueError, "previous has hooks, .*L1Unstructured"),
    ("pruned norm", lambda: (conv(), pruned(norm())), ValueError, "bn has hooks, .*L1Unstructured"),
    (
        "parametrized weight norm",
        lambda: (parametrizations.weight_norm(conv()), norm()),
        ValueError,
        "previous has parametrizations",
    ),
    (
        "parametrized spectral norm",
        lambda: (parametrizations.spectral_norm(conv()), norm()),
        ValueError,
        "previous has parametrizations",
    ),
    (
        "parametrized bn",
        lambda: (conv(), nn.utils.parametrize.register_parametrization(norm(), "weight", nn.Softplus())),
        ValueError,
        "bn has parametrizations",
    ),
    ("conv's own forward", lambda: (with_forward(conv()), norm()), ValueError, "previous has its own forward"),
    ("norm's own forward", lambda: (conv(), with_forward(norm())), ValueError, "bn has its own forward"),
    ("meta conv", lambda: (conv().to("meta"), norm()), ValueError, "previous.weight is on the meta device"),
    ("meta norm", lambda: (conv(), norm().to("meta")), ValueError, "bn.running_mean is on the meta device"),
    ("complex", lambda: (conv().to(torch.complex64), norm()), TypeError, "previous.weight must be .*torch.complex64"),
    (
        "integer",
        lambda: (with_weight(conv(), torch.ones(3, 3, 1, 1, dtype=torch.int8)), norm()),
        TypeError,
        "previous.weight must be .*torch.int8",
    ),
    (
        "float8",
        lambda: (with_weight(conv(), torch.ones(3, 3, 1, 1).to(torch.float8_e4m3fn)), norm()),
        TypeError,
        "previous.weight must be .*torch.float8_e4m3fn",
    ),
    (
        "complex norm",
        lambda: (conv(), with_weight(norm(), torch.ones(3, dtype=torch.complex64))),
        TypeError,
        "bn.weight must be .*torch.complex64",
    ),
    (
        "subclass of Tensor",
        lambda: (conv(), changed(norm(), lambda m: setattr(m, "running_var", torch.ones(3).as_subclass(Wrapper)))),
        TypeError,
        "bn.running_var must be a plain tensor, got Wrapper",
    ),
    (
        "too large for float16",
        lambda: (conv().half(), changed(norm(), lambda m: m.weight.data.fill_(1e6))),
        ValueError,
        "the folded weight has values that are not finite in torch.float16",
    ),
    (
        "variance below zero",
        lambda: (conv(), changed(norm(), lambda m: m.running_var.fill_(-1))),
        ValueError,
        "the folded weight has values that are not finite in torch.float32",
    ),
]


def tensors_of(module: Any) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []


@pytest.mark.parametrize(("make", "kind", "message"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_layers_that_cannot_be_folded_are_refused(
    make: Callable[[], tuple[Any, Any]], kind: type[Exception], message: str
) -> None:
    modules = make()
    before = [(tensor, tensor._version) for module in modules for tensor in tensors_of(module)]
    with pytest.raises(kind, match=f"^fold_bn: {message}"):
        normfused.fold_bn(*modules)
    after = [(tensor, tensor._version) for module in modules for tensor in tensors_of(module)]
    assert [version for _, version in after] == [version for _, version in before]
    assert all(a is b for (a, _), (b, _) in zip(after, before, strict=True))


def test_several_devices_are_refused(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("needs a second device")
    with pytest.raises(ValueError, match=r"^fold_bn: bn.running_mean is on cuda:0, but previous.weight is on cpu$"):
        normfused.fold_bn(conv(), norm().to(device))
