"""SyncBatchNorm of exact data on two and three ranks: every result has the exact value, with tolerance 0.

A rank sends its standard deviation, so the variance of its part of the batch is a square: 4.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from common import dtype_id
from exact_batch_norm import Call, of_statistics
from exact_data import MOMENTUM, assert_exact, statistics
from on_ranks import assert_equal_on_all_ranks, share, total
from ranks import Ranks
from torch import distributed

import normfused

pytestmark = [
    pytest.mark.usefixtures("needs_extension"),
    pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed"),
]
# Samples of each rank, differences of its mean from that of the batch, and the variance of the batch.
PARTS = {
    "two": ([8, 8], [2, -2], 8),
    "three": ([6, 12, 6], [2, 0, -2], 6),
    "three, equal means": ([3, 8, 1], [0, 0, 0], 4),
}
LENGTH, CHANNELS = 34, 5


CASES = [
    (parts, dtype)
    for parts in PARTS
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    if (parts, dtype) != ("three", torch.float64)  # merging different means divides by 3: float64 shows the rounding
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("parts", "dtype"), CASES, ids=dtype_id)
def test_ranks(ranks: Ranks, parts: str, dtype: torch.dtype, activation: str | None) -> None:
    ranks.run(len(PARTS[parts][0]), check, parts, dtype, activation)


def check(parts: str, dtype: torch.dtype, activation: str | None) -> None:
    samples, shifts, variance = PARTS[parts]
    call = Call(activation=activation, residual=activation is not None, variance=variance, invstd=Fraction(1, 4))
    counts = [number * LENGTH for number in samples]
    shuffled = dtype == torch.float32
    data = of_statistics(
        statistics(CHANNELS, counts, shuffled, 4, shifts),
        *(sum(samples), dtype, torch.promote_types(dtype, torch.float32), call, shuffled),
    )
    cls = normfused.SyncBatchNorm if activation is None else normfused.SyncBatchNormAct
    options = {} if activation is None else {"activation": activation}
    layer = cls(CHANNELS, eps=call.eps, momentum=float(MOMENTUM), dtype=data.weight.dtype, **options)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(layer, name).copy_(getattr(data, name))
    x = share(data.input, tuple(samples)).requires_grad_()
    residual = None if data.residual is None else share(data.residual, tuple(samples)).requires_grad_()
    output = layer(x, residual)
    output.backward(share(data.grad_output, tuple(samples)))
    got = {
        "output": output,
        "grad_input": x.grad,
        "grad_weight": total(layer.weight.grad),
        "grad_bias": total(layer.bias.grad),
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }
    if residual is not None:
        got["grad_residual"] = residual.grad
    assert got.keys() == data.expected.keys()
    expected = {
        name: share(value, tuple(samples)) if value.dim() == 3 else value for name, value in data.expected.items()
    }
    assert_exact(**{name: (got[name], expected[name]) for name in got})
    assert_equal_on_all_ranks(layer.running_mean, layer.running_var)
