"""Converted models under DistributedDataParallel and fully_shard, on two ranks, equal unconverted ones."""

from __future__ import annotations

import copy

import pytest
import torch
from models import BasicBlock
from ranks import Ranks
from torch import Tensor, distributed, nn

import normfused

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.usefixtures("needs_extension")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU()
    return nn.Sequential(*stem, BasicBlock(4, 4, 1), BasicBlock(4, 6, 2), nn.Flatten(), nn.Linear(24, 2)).double()


def three_steps(model: nn.Module) -> list[Tensor]:
    rank = distributed.get_rank()
    optimizer, outputs = torch.optim.SGD(model.parameters(), 0.01), []
    for step in range(3):
        x = torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        y = model(x[4 * rank : 4 * rank + 4 - step])
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def data_parallel(synchronized: bool) -> str:
    stock, ours = network(), normfused.convert(network())
    if synchronized:
        normfused.convert_sync_batchnorm(stock)
        normfused.convert_sync_batchnorm(ours)
    results = [three_steps(nn.parallel.DistributedDataParallel(m)) for m in (ours, stock)]
    assert_equal(*results)
    assert_equal([*ours.state_dict().values()], [*stock.state_dict().values()])
    return str(normfused.conversion_report(ours))


def test_under_distributed_data_parallel(ranks: Ranks) -> None:
    for report in ranks.run(2, data_parallel, False):
        assert ", 5 fused" in report


@pytest.mark.exhaustive
def test_synchronized_under_distributed_data_parallel(ranks: Ranks) -> None:
    # They call separate operators before and after the exchange, and are not fused.
    for report in ranks.run(2, data_parallel, True):
        assert ", 0 fused" in report


def sharded(of_whole: bool) -> None:
    models = []
    for convert in (True, False):
        model = network()
        if convert and of_whole:
            normfused.convert(model)
        for block in (model[3], model[4]):
            if convert and not of_whole:
                normfused.convert(block)
            fsdp.fully_shard(block)
        models.append(fsdp.fully_shard(model))
    assert_equal(*map(three_steps, models))
    for ours, theirs in zip(*(m.state_dict().values() for m in models), strict=True):
        full = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (ours, theirs)]
        torch.testing.assert_close(*full, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="torch has no fully_shard")
@pytest.mark.parametrize("of_whole", [True, False])
def test_under_fully_shard(ranks: Ranks, of_whole: bool) -> None:
    ranks.run(2, sharded, of_whole)


def average_of_converted() -> float:
    ours = normfused.convert(network())
    average = torch.optim.swa_utils.AveragedModel(ours)
    three_steps(ours)
    average.update_parameters(ours)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    return float((average(x) - copy.deepcopy(ours)(x)).detach().abs().max())


def test_averaged_models(ranks: Ranks) -> None:
    assert max(ranks.run(2, average_of_converted)) < 1e-9
