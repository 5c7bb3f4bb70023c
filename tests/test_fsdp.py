"""``fully_shard`` (FSDP2) on two ranks: training steps, state and precision of models that hold our layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_ranks import share
from ranks import Ranks
from torch import Tensor, distributed, nn

import normfused

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="torch has no fully_shard")

KINDS = ["plain", "activation", "skip", "inplace", "synchronized"]


def layer(kind: str, channels: int) -> nn.Module:
    made: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: normfused.BatchNorm2d(channels),
        "activation": lambda: normfused.BatchNormAct2d(channels, "gelu"),
        "skip": lambda: normfused.BatchNorm2d(channels, nonfinite="skip", momentum=None),
        "inplace": lambda: normfused.BatchNormAct2d(channels, "leaky_relu", inplace=True),
        "synchronized": lambda: normfused.SyncBatchNormAct(channels, "relu"),
    }
    return made[kind]()


def network(kind: str) -> nn.Sequential:
    """The number of channels of its second layer is not a multiple of the number of ranks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), layer(kind, 4)),
        nn.Sequential(nn.Conv2d(4, 5, 3), layer(kind, 5)),
        nn.Flatten(),
        nn.Linear(20, 2),
    )


def sharded(kind: str, policy: Any = None) -> Any:
    model = network(kind)
    options = {} if policy is None else {"mp_policy": policy}
    for block in model[:2]:
        fsdp.fully_shard(block, **options)
    return fsdp.fully_shard(model, **options)


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 3, 6, 6) for _ in range(3)]


def one_process(kind: str) -> tuple[nn.Module, list[Tensor], list[nn.Module]]:
    """The expected model after training, the loss of each step, and for each rank a model with its buffers."""
    model = network("activation" if kind == "synchronized" else kind)
    if kind == "synchronized":  # its statistics are those of the whole batch
        for block in model[:2]:
            block[1] = normfused.BatchNormAct2d(block[1].num_features, "relu")
    of_ranks: list[nn.Module] = [copy.deepcopy(model) for _ in range(2)]
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for x in batches():
        parts = [(of_ranks[0], x)] if kind == "synchronized" else list(zip(of_ranks, x.split(4), strict=True))
        total = torch.zeros(())
        optimizer.zero_grad()
        for part, own in parts:
            part.load_state_dict({**part.state_dict(), **dict(model.named_parameters())})
            part.zero_grad()
            loss = part(own).square().mean()
            loss.backward()
            total += loss.detach() / len(parts)
            for p, grad in zip(model.parameters(), part.parameters(), strict=True):
                assert grad.grad is not None
                p.grad = grad.grad / len(parts) if p.grad is None else p.grad + grad.grad / len(parts)
        optimizer.step()
        losses.append(total)
    return model, losses, [of_ranks[0], of_ranks[0 if kind == "synchronized" else 1]]


def train(model: Any) -> list[Tensor]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for x in batches():
        optimizer.zero_grad()
        loss = model(share(x, (4, 4))).float().square().mean()
        loss.backward()
        optimizer.step()
        total = loss.detach()
        distributed.all_reduce(total)
        losses.append(total / 2)
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_one_process(ranks: Ranks, needs_extension: None, kind: str) -> None:
    ranks.run(2, as_one_process, kind)


def as_one_process(kind: str) -> None:
    from torch.distributed.tensor import DTensor

    expected, expected_losses, of_ranks = one_process(kind)
    model = sharded(kind)
    inside: list[type] = []
    model[0][1].register_forward_hook(lambda module, *_: inside.append(type(module.weight)))
    losses = train(model)
    for a, e in zip(losses, expected_losses, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    assert not any(issubclass(kind, DTensor) for kind in inside)
    for (name, a), e in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert isinstance(a, DTensor), name
        torch.testing.assert_close(a.full_tensor(), e, rtol=1e-3, atol=1e-5)
    for a, e in zip(model.buffers(), of_ranks[distributed.get_rank()].buffers(), strict=True):
        assert type(a) is Tensor
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "synchronized"])
def test_checkpointed_layers_update_once(ranks: Ranks, needs_extension: None, kind: str) -> None:
    ranks.run(2, with_checkpoints, kind)


def with_checkpoints(kind: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, plain = network(kind), sharded(kind)
    model[0], model[1] = checkpoint_wrapper(model[0]), checkpoint_wrapper(model[1])
    for block in model[:2]:
        fsdp.fully_shard(block)
    fsdp.fully_shard(model)
    for a, e in zip(train(model), train(plain), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    for a, e in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["skip", "synchronized"])
def test_the_full_state_equals_that_of_a_plain_model(ranks: Ranks, needs_extension: None, kind: str) -> None:
    ranks.run(2, whole_state, kind)


def whole_state(kind: str) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    model = sharded(kind)
    train(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if distributed.get_rank() == 0:
        plain = network(kind)
        assert list(state) == list(plain.state_dict())
        plain.load_state_dict(state)
        for name, value in plain.state_dict().items():
            assert torch.equal(value, state[name])
    own = {name: whole(value) for name, value in model.state_dict().items()}  # with this rank's buffers
    other = sharded(kind)
    set_model_state_dict(other, copy.deepcopy(own), options=StateDictOptions(full_state_dict=True))
    for name, value in other.state_dict().items():
        assert torch.equal(whole(value), own[name]), name
    x = share(batches()[0], (4, 4))
    assert torch.equal(other.eval()(x), model.eval()(x))


def whole(value: Any) -> Tensor:
    result: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_in_bfloat16_with_buffers_in_float32(ranks: Ranks, needs_extension: None, kind: str) -> None:
    ranks.run(2, in_bfloat16, kind)


def in_bfloat16(kind: str) -> None:
    _, expected, of_ranks = one_process(kind)
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(kind, policy)
    seen: list[Any] = []
    model[0][1].register_forward_hook(lambda m, x, y: seen.append((x[0].dtype, m.weight.dtype, y.dtype)))
    losses = train(model)
    assert set(seen) == {(torch.bfloat16,) * 3}
    for a, e in zip(losses, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0.05, atol=0.02)
    for a, e in zip(model.buffers(), of_ranks[distributed.get_rank()].buffers(), strict=True):
        assert a.dtype in (torch.float32, torch.int64)
        torch.testing.assert_close(a, e, rtol=0.1, atol=0.05)


def test_a_model_created_on_the_meta_device(ranks: Ranks, needs_extension: None) -> None:
    ranks.run(2, from_meta)


def from_meta() -> None:
    with torch.device("meta"):
        model = network("skip")
    for block in model[:2]:
        fsdp.fully_shard(block)
    fsdp.fully_shard(model)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(77)  # as uninitialized memory
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, buffer in model.named_buffers():
        initial = 1 if name.endswith("running_var") else 0
        assert torch.equal(buffer, torch.full_like(buffer, initial)), name
    train(model)
    assert all(int(model[i][1].num_batches_tracked) == 3 for i in (0, 1))
