"""Batch norm folded into the layer before it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import normfused

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
        lambda: normfused.fold_bn(nn.Conv2d(3, 3, 1), normfused.BatchNorm2d(3, activation="relu").eval()),
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
