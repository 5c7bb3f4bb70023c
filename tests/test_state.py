"""Copies, checkpoints on disk and other transfers of the state of a layer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel

import normfused

# ---- process groups --------------------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """A process group other than the default one."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield distributed.new_group([0])
    finally:
        distributed.destroy_process_group()


def made_directly(group: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(2, 3, 1), normfused.SyncBatchNorm(3, process_group=group))


def converted(group: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))
    result = normfused.convert_sync_batchnorm(model, process_group=group)
    assert isinstance(result, nn.Sequential)
    return result


makers = pytest.mark.parametrize("make", [made_directly, converted])


def averaged(model: nn.Sequential) -> Any:
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    return average.module


@makers
@pytest.mark.parametrize("copied", [copy.deepcopy, averaged, lambda model: copy.deepcopy(copy.deepcopy(model))])
def test_copies_keep_the_process_group(
    group: Any, make: Callable[[Any], nn.Sequential], copied: Callable[[nn.Sequential], Any]
) -> None:
    model = make(group)
    model(torch.randn(4, 2, 5))
    other = copied(model)
    assert other[1].process_group is group
    assert type(other[1]) is normfused.SyncBatchNorm
    for (name, a), (_, e) in zip(other.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(a, e), name
        assert a.data_ptr() != e.data_ptr()
    x = torch.randn(4, 2, 5)
    assert torch.equal(other(x), model(x))


def test_a_shallow_copy_shares_group_and_parameters(group: Any) -> None:
    layer = normfused.SyncBatchNorm(3, process_group=group)
    other = copy.copy(layer)
    assert other.process_group is group
    assert other.weight is layer.weight


def test_a_layer_used_twice_is_copied_once(group: Any) -> None:
    layer = normfused.SyncBatchNorm(3, process_group=group)
    first, second = copy.deepcopy(nn.ModuleList([layer, layer]))
    assert first is second


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@makers
@pytest.mark.parametrize("stored", [lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_pickles_drop_the_process_group_and_warn(
    group: Any, make: Callable[[Any], nn.Sequential], stored: Callable[[nn.Module], Any]
) -> None:
    model = make(group)
    with pytest.warns(UserWarning, match=r"^SyncBatchNorm\(3\).*: its process group is not pickled"):
        loaded = stored(model)
    assert loaded[1].process_group is None
    assert model[1].process_group is group
    for a, e in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, e)


@pytest.mark.filterwarnings("error")
def test_the_default_group_is_pickled_without_a_warning() -> None:
    layer = normfused.SyncBatchNormAct(3, activation="relu")
    assert pickle.loads(pickle.dumps(layer)).activation == "relu"


# ---- the counter of nonfinite="skip" ---------------------------------------------------------------------------------

LAYERS: list[Callable[..., Any]] = [
    normfused.BatchNorm1d,
    normfused.BatchNorm2d,
    normfused.BatchNorm3d,
    normfused.BatchNormAct1d,
    normfused.SyncBatchNorm,
    normfused.SyncBatchNormAct,
]
layers = pytest.mark.parametrize("make", LAYERS)


def counts(layer: Any) -> list[int]:
    """The values of the counter. Checks that the layer continues to count from them."""
    buffer: Tensor = layer.nonfinite_batches
    assert buffer.dtype == torch.int64
    values: list[int] = buffer.tolist()
    dims = {normfused.BatchNorm2d: 2, normfused.BatchNorm3d: 3}.get(type(layer), 1)
    x = torch.randn(4, 3, *[2] * dims, dtype=layer.running_mean.dtype)
    x[0, 1] = torch.nan
    layer(x)
    assert layer.nonfinite_batches.tolist() == [values[0], values[1] + 1, values[2]]
    return values


def counted(make: Callable[..., Any], **options: Any) -> Any:
    layer = make(3, nonfinite="skip", **options)
    assert counts(layer) == [0, 0, 0]
    return layer


@layers
def test_the_counter_starts_at_zero_after_to_empty(make: Callable[..., Any]) -> None:
    layer = make(3, nonfinite="skip", device="meta").to_empty(device="cpu")
    layer.nonfinite_batches.fill_(123)  # as uninitialized memory
    layer.reset_parameters()
    assert counts(layer) == [0, 0, 0]


@layers
@pytest.mark.parametrize("assign", [True, False])
def test_the_counter_starts_at_zero_when_a_state_is_loaded(make: Callable[..., Any], assign: bool) -> None:
    state = counted(make).state_dict()
    layer = make(3, nonfinite="skip", device="meta")
    if not assign:
        layer = layer.to_empty(device="cpu")
        layer.nonfinite_batches.fill_(123)
    model = nn.Sequential(layer)
    model.load_state_dict({f"0.{name}": value for name, value in state.items()}, assign=assign)
    assert counts(layer) == [0, 0, 0]


@layers
def test_the_counter_restarts_with_the_running_statistics(make: Callable[..., Any]) -> None:
    layer = counted(make)
    layer.reset_running_stats()
    assert counts(layer) == [0, 0, 0]


@layers
def test_a_partial_state_leaves_the_counter(make: Callable[..., Any]) -> None:
    layer = counted(make)
    layer.load_state_dict({"weight": torch.ones(3)}, strict=False)
    assert counts(layer) == [0, 1, 0]


MOVED: list[Callable[[Any], Any]] = [
    lambda layer: layer.double(),
    lambda layer: layer.to(torch.float64),
    lambda layer: layer.to("cpu"),
    lambda layer: layer.half().float(),
    copy.deepcopy,
    lambda layer: pickle.loads(pickle.dumps(layer)),
    saved,
]


@layers
@pytest.mark.parametrize("moved", MOVED, ids=["double", "to", "to cpu", "half", "deepcopy", "pickle", "save"])
def test_the_counter_is_moved_and_copied(make: Callable[..., Any], moved: Callable[[Any], Any]) -> None:
    assert counts(moved(counted(make))) == [0, 1, 0]


@pytest.mark.parametrize(("loaded", "copied"), [(False, False), (True, False), (True, True)])
def test_lazy_layers_count_from_their_first_input(loaded: bool, copied: bool) -> None:
    layer: Any = normfused.LazyBatchNorm1d(nonfinite="skip")
    if loaded:
        layer.load_state_dict(counted(normfused.BatchNorm1d).state_dict())
    layer = copy.deepcopy(layer) if copied else layer
    layer(torch.randn(4, 3))
    assert type(layer) is normfused.BatchNorm1d
    assert counts(layer) == [0, 0, 0]


def test_the_counter_is_not_in_the_state_dict() -> None:
    layer = normfused.BatchNorm1d(3, nonfinite="skip")
    assert list(layer.state_dict()) == list(nn.BatchNorm1d(3).state_dict())


def test_a_counter_on_another_device_is_refused() -> None:
    layer = normfused.BatchNorm1d(3, nonfinite="skip")
    layer.nonfinite_batches = layer.nonfinite_batches.to("meta")
    with pytest.raises(ValueError, match=r"^batch_norm: nonfinite_batches must be an int64 tensor .* on meta$"):
        layer(torch.randn(4, 3))
    assert layer.num_batches_tracked.item() == 0
