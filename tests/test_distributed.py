"""Several processes: collectives, groups, ranks that diverge, DDP, data set statistics."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator

import pytest
import torch
from models import resnet50
from on_ranks import GATHER, REDUCE, Traffic, assert_close, assert_equal_on_all_ranks, error_of, gather_all
from ranks import Ranks
from torch import Tensor, distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import normfused

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_collective_in_forward_and_one_in_backward(needs_extension: None, ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.run(2, count_collectives, dtype)


def count_collectives(dtype: torch.dtype) -> None:
    channels, size = 5, 8 if dtype == torch.float64 else 4
    layer = normfused.SyncBatchNormAct(channels, dtype=dtype, activation="relu")
    x, r = (torch.randn(3, channels, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    with Traffic() as traffic:
        y = layer(x, r)
        assert traffic.calls == [(GATHER, 2 * channels * size + 8)]  # two statistics per channel, and one int64
        y.sum().backward()
    assert traffic.calls[1:] == [(REDUCE, 2 * channels * size)]
    with Traffic() as traffic:
        layer(x.detach()).sum().backward()  # the gradient of the input is not requested
    assert [name for name, _ in traffic.calls] == [GATHER]
    with Traffic() as traffic:
        layer.eval()(x).sum().backward()
        layer.train().freeze()(x).sum().backward()
        with normfused.no_stats_update():
            layer(x)
    assert traffic.calls == []
    layer.unfreeze()
    with normfused.no_stats_update(), Traffic() as traffic:  # the statistics of the batch are still synchronized
        layer(x)
    assert len(traffic.calls) == 1
    alone = distributed.new_group([0]), distributed.new_group([1])
    layer.process_group = alone[distributed.get_rank()]
    with Traffic() as traffic:
        layer(x).sum().backward()
    assert traffic.calls == []


def test_evaluation_and_one_process_need_no_group() -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    layer, alone = normfused.SyncBatchNormAct(3, activation="relu"), normfused.BatchNormAct1d(3, activation="relu")
    for training in (True, False):
        got, expected = layer.train(training)(x), alone.train(training)(x)
        assert torch.equal(got, expected)
        assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)))
    assert all(map(torch.equal, layer.state_dict().values(), alone.state_dict().values()))
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert isinstance(normfused.SyncBatchNorm(3), nn.SyncBatchNorm)


@pytest.fixture
def fake_group(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process group of the requested size, in which only this rank exists."""
    distributed.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.exhaustive
@pytest.mark.parametrize("fake_group", [2, 64, 1024], indirect=True, ids=str)
def test_collectives_of_a_whole_network(needs_extension: None, fake_group: None) -> None:
    model = normfused.convert_sync_batchnorm(resnet50())
    layers = [m for m in model.modules() if isinstance(m, normfused.SyncBatchNorm)]
    channels = sum(layer.num_features for layer in layers)
    assert len(layers) == 53
    with Traffic() as traffic:
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    forward = [nbytes for name, nbytes in traffic.calls if name == GATHER]
    backward = [nbytes for name, nbytes in traffic.calls if name == REDUCE]
    assert (len(forward), len(backward), len(traffic.calls)) == (53, 53, 106)
    assert sum(forward) == 8 * (channels + 53)
    assert sum(backward) == 8 * channels
    model.eval()
    with Traffic() as traffic:
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert traffic.calls == []


def test_layers_that_share_collectives(needs_extension: None, ranks: Ranks) -> None:
    ranks.run(2, share_collectives)


def share_collectives() -> None:
    def build() -> list[normfused.SyncBatchNorm]:
        return [
            normfused.SyncBatchNorm(3),
            normfused.SyncBatchNormAct(5, activation="silu"),
            normfused.SyncBatchNorm(2),
        ]

    torch.manual_seed(distributed.get_rank())
    shapes = [(4, 3, 6), (2, 5, 3, 3), (7, 2)]
    inputs = [torch.randn(shape) for shape in shapes]
    results = []
    for coalesced in (False, True):
        layers, xs = build(), [x.clone().requires_grad_() for x in inputs]
        residual = torch.ones(shapes[1])
        with Traffic() as traffic:
            if coalesced:
                outputs = normfused.SyncBatchNorm.forward_many(
                    [(layers[0], xs[0]), (layers[1], xs[1], residual), (layers[2], xs[2])]
                )
            else:
                outputs = [layers[0](xs[0]), layers[1](xs[1], residual), layers[2](xs[2])]
            sum(y.square().sum() for y in outputs).backward()
        assert len(traffic.calls) == (2 if coalesced else 6)
        results.append([*outputs, *(x.grad for x in xs), *(p for layer in layers for p in layer.state_dict().values())])
        results[-1] += [p.grad for layer in layers for p in layer.parameters()]
    assert all(map(torch.equal, *results))
    layers = build()
    layers[1].eval()
    with Traffic() as traffic:
        normfused.SyncBatchNorm.forward_many(list(zip(layers, inputs, strict=True)))
    assert len(traffic.calls) == 1
    layers[0].process_group = distributed.new_group([0, 1])
    with pytest.raises(ValueError, match="layers of one process group"):
        normfused.SyncBatchNorm.forward_many(list(zip(layers, inputs, strict=True)))


def test_process_groups(ranks: Ranks) -> None:
    ranks.run(4, process_groups)


def process_groups() -> None:
    groups = [distributed.new_group([0, 2]), distributed.new_group([1, 3])]
    rank = distributed.get_rank()
    layer = normfused.SyncBatchNorm(3, process_group=groups[rank % 2], momentum=1.0)
    x = torch.arange(4 * 3 * 5.0).view(4, 3, 5).square()
    layer(x[rank : rank + 1])
    expected = x[rank % 2 :: 2].transpose(0, 1).flatten(1)
    assert torch.allclose(layer.running_mean, expected.mean(1))
    assert torch.allclose(layer.running_var, expected.var(1))
    layer.process_group = groups[(rank + 1) % 2]
    with pytest.raises(RuntimeError, match=r"^SyncBatchNorm\(3\): this process is not in its process group"):
        layer(x)
    layer.process_group = groups[rank % 2]
    distributed.destroy_process_group(groups[rank % 2])
    with pytest.raises(RuntimeError, match=r"^SyncBatchNorm\(3\): its process group is destroyed"):
        layer(x)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_compiled_with_fullgraph(ranks: Ranks, needs_extension: None, dynamic: bool) -> None:
    ranks.run(2, compiled_with_fullgraph, dynamic, timeout=300)


def compiled_with_fullgraph(dynamic: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(distributed.get_rank())

    def build() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            normfused.SyncBatchNormAct(8, activation="relu"),
            nn.Conv2d(8, 4, 1),
            normfused.SyncBatchNorm(4, momentum=None),
        )

    eager, compiled = build(), build()
    run = torch.compile(compiled, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (4, 4, 3) if dynamic else (4, 4):
        x = torch.randn(batch, 3, 6, 6)
        outputs = []
        for model, call in ((eager, eager), (compiled, run)):
            model.zero_grad()
            y = call(x)
            y.square().sum().backward()
            outputs.append([y.detach(), *(p.grad for p in model.parameters()), *model.state_dict().values()])
        assert all(map(torch.equal, *outputs))
    with Traffic() as traffic:
        eager(x).sum().backward()
    assert len(traffic.calls) == 4


@pytest.mark.parametrize("mode", ["broadcast", "mean", "pooled"])
def test_sync_running_stats(ranks: Ranks, mode: str) -> None:
    ranks.run(3, sync_running_stats, mode)


def sync_running_stats(mode: str) -> None:
    torch.manual_seed(distributed.get_rank())
    model = nn.Sequential(
        nn.BatchNorm1d(3), normfused.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3)
    )
    data = torch.randn(3, 6, 3, 4) * torch.arange(1.0, 4).view(3, 1, 1, 1) + torch.arange(3.0).view(3, 1, 1, 1)
    data = gather_all(data)[0]
    for layer in model[:2]:
        layer.momentum = 1.0
    own = data[distributed.get_rank()]
    for _ in range(1 + distributed.get_rank()):
        model(own)
    before = [[torch.stack(gather_all(b)) for b in (m.running_mean, m.running_var)] for m in model[:2]]
    with Traffic() as traffic:
        normfused.sync_running_stats(model, mode)
    assert len(traffic.calls) == 1
    assert_equal_on_all_ranks(*model.state_dict().values())
    for layer, (means, variances) in zip(model[:2], before, strict=True):
        mean, variance = (means[0], variances[0]) if mode == "broadcast" else (means.mean(0), variances.mean(0))
        if mode == "pooled":
            variance = variance + means.var(0, correction=0)
        assert torch.allclose(layer.running_mean, mean)
        assert torch.allclose(layer.running_var, variance)
        assert layer.num_batches_tracked == (1 if mode == "broadcast" else 3)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"^sync_running_stats: mode must be one of .*, pooled, got 'sum'$"):
        normfused.sync_running_stats(nn.BatchNorm1d(3), "sum")
    with pytest.raises(RuntimeError, match="needs a process group"):
        normfused.sync_running_stats(nn.BatchNorm1d(3))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = normfused.SyncBatchNorm(3), normfused.SyncBatchNorm(3)

    def forward(self, x: Tensor, only: str = "") -> Tensor:
        if only != "second":
            x = self.first(x)
        return x if only == "first" else self.second(x)


DEBUG = {"NORMFUSED_SYNC_DEBUG": "1", "NORMFUSED_SYNC_DEBUG_TIMEOUT": "2"}


@pytest.mark.parametrize("difference", ["layer", "channels", "gradients", "absence", "mode", "backward"])
def test_ranks_that_diverge_raise(ranks: Ranks, difference: str) -> None:
    first, second = ranks.run(2, diverge, difference, **DEBUG)
    here, there = "SyncBatchNorm(3) first", {"layer": "SyncBatchNorm(3) second", "channels": "5 channels"}
    if difference in ("layer", "channels", "gradients"):
        for error in (first, second):
            assert error.startswith("RuntimeError: ranks diverge: rank ")
            assert here in error
            assert there.get(difference, "gradients of: input, weight, bias") in error
    else:
        direction = "backward" if difference == "backward" else "forward"
        assert first.startswith(f"RuntimeError: rank 0 is at {direction} of {here}")
        assert first.endswith("but rank 1 has not arrived within 2 s")
        assert second == ""


def hooks_on_all_modules() -> tuple[int, int]:
    hooks = nn.modules.module._global_forward_pre_hooks
    model, x = Two(), torch.randn(4, 3, 5)
    model(x)
    during = len(hooks)
    del os.environ["NORMFUSED_SYNC_DEBUG"]
    model(x)
    os.environ["NORMFUSED_SYNC_DEBUG"] = "1"  # the caller removes it
    return during, len(hooks)


def test_debugging_leaves_no_hook_when_it_ends(ranks: Ranks) -> None:
    """A remaining hook on all modules would disable the fusion of converted models."""
    assert ranks.run(2, hooks_on_all_modules, NORMFUSED_SYNC_DEBUG="1") == [(1, 0)] * 2


def diverge(difference: str) -> str:
    model = Two()
    x = torch.randn(4, 3, 5, requires_grad=True)
    for _ in range(4):  # without divergence
        model(x).sum().backward()
    if distributed.get_rank() == 0:
        return error_of(lambda: model(x, "first").sum().backward())
    if difference == "layer":
        return error_of(lambda: model(x, "second"))
    if difference == "channels":
        model.first = normfused.SyncBatchNorm(5)
        return error_of(lambda: model(torch.randn(4, 5)))
    if difference == "gradients":
        return error_of(lambda: model(x.detach()))
    if difference == "mode":
        model.eval()(x)
    if difference == "backward":
        model(x, "first")
    time.sleep(3)  # while the other rank waits
    return ""


def test_ranks_with_other_channels_do_not_hang(ranks: Ranks) -> None:
    one = "SyncBatchNorm(3) (3 channels, statistics in float32)"
    other = "SyncBatchNorm(6) (6 channels, statistics in float32)"
    double = "SyncBatchNorm(3) (3 channels, statistics in float64)"
    for seconds, there in ((other_channels, other), (other_dtype, double)):
        assert ranks.run(2, seconds) == [
            f"RuntimeError: ranks diverge: rank 0 is at {one}, rank 1 at {there}",
            f"RuntimeError: ranks diverge: rank 1 is at {there}, rank 0 at {one}",
        ]
    errors = ranks.run(4, other_channels, 2)
    assert [bool(error) for error in errors] == [True] * 4
    assert errors[2].startswith(f"RuntimeError: ranks diverge: rank 2 is at {other}, rank ")
    for rank in (1, 3):
        assert errors[rank] == f"RuntimeError: ranks diverge: rank {rank} is at {one}, rank 2 at {other}"
    # Rank 0 is not told of the difference, but does not hang either.
    assert errors[0].startswith("RuntimeError: SyncBatchNorm(3): the collective failed: ")


def other_channels(other: int = 1) -> str:
    channels = 6 if distributed.get_rank() == other else 3
    return error_of(lambda: normfused.SyncBatchNorm(channels)(torch.randn(4, channels)))


def other_dtype() -> str:
    dtype = torch.float64 if distributed.get_rank() == 1 else torch.float32
    return error_of(lambda: normfused.SyncBatchNorm(3, dtype=dtype)(torch.randn(4, 3, dtype=dtype)))


@pytest.mark.parametrize("size", [2, 3])
def test_ddp_equals_one_process(ranks: Ranks, size: int) -> None:
    ranks.run(size, ddp)


def ddp() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.BatchNorm1d(6)
        )
        return model.double()

    rank, size = distributed.get_rank(), distributed.get_world_size()
    x, target = torch.randn(6, 4 * size, 1, 8, 8, dtype=torch.float64), torch.randint(0, 6, (6, 4 * size))
    alone, shared = build(), normfused.convert_sync_batchnorm(build())
    model = nn.parallel.DistributedDataParallel(shared)
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (alone, model)]
    for images, classes in zip(x, target, strict=True):
        own = slice(4 * rank, 4 * rank + 4)
        losses = [
            nn.functional.cross_entropy(alone(images), classes),
            nn.functional.cross_entropy(model(images[own]), classes[own]),
        ]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for expected, got in zip(alone.state_dict().values(), shared.state_dict().values(), strict=True):
        assert_close(got, expected, 1e-9)
        assert_equal_on_all_ranks(got)


def test_ddp_still_refuses_torchs_layer_on_the_cpu(ranks: Ranks) -> None:
    assert ranks.run(2, ddp_of_torchs_own) == ["ValueError: SyncBatchNorm layers only work with GPU modules"] * 2


def ddp_of_torchs_own() -> str:
    return error_of(lambda: nn.parallel.DistributedDataParallel(nn.Sequential(nn.SyncBatchNorm(3))))


def test_convert_and_revert() -> None:
    class Custom(nn.BatchNorm2d):
        pass

    shared = nn.BatchNorm2d(3, momentum=None).eval()
    model = nn.Sequential(
        shared, normfused.BatchNormAct1d(3, activation="relu", nonfinite="skip"), nn.SyncBatchNorm(3), Custom(3)
    )
    model.append(nn.Sequential(shared, nn.BatchNorm3d(3, affine=False).half()))
    model[1].weight.requires_grad_(False)
    hook = model[1].register_forward_hook(lambda *_: None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    parameters = list(map(id, model.parameters()))
    with pytest.warns(RuntimeWarning, match="skips 3: Custom is not a batch norm class"):
        assert normfused.convert_sync_batchnorm(model, "group") is model
    sync, with_activation = normfused.SyncBatchNorm, normfused.SyncBatchNormAct
    assert [type(m) for m in model] == [sync, with_activation, sync, Custom, nn.Sequential]
    synchronized = [m for m in model.modules() if isinstance(m, (sync, with_activation))]
    assert [m.path for m in synchronized] == ["0", "1", "2", "4.1"]
    assert all(m.process_group == "group" for m in synchronized)
    assert model[4][0] is model[0] is shared
    assert not model[0].training
    assert model[0].momentum is None
    assert (model[1].activation, model[1].nonfinite, list(model[1]._forward_hooks)) == ("relu", "skip", [hook.id])
    assert model.state_dict().keys() == before.keys()
    copied = pickle.loads(pickle.dumps(normfused.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))))
    assert type(normfused.revert(copied)[0]) is nn.BatchNorm2d
    normfused.revert(model)
    assert [type(m) for m in model.modules()] == types
    assert list(map(id, model.parameters())) == parameters
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model[0], "process_group")
    assert model[1].weight.requires_grad is False


def test_convert_refuses_inplace_layers_before_any_change() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), normfused.BatchNormAct1d(3, activation="leaky_relu", inplace=True))
    with pytest.raises(ValueError, match=r"^convert_sync_batchnorm: 1 has inplace=True, and cannot be synchronized$"):
        normfused.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d
    for synchronized in (normfused.SyncBatchNorm, normfused.SyncBatchNormAct):
        with pytest.raises(TypeError, match="unexpected keyword argument 'inplace'"):
            synchronized(3, inplace=True)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        normfused.convert_sync_batchnorm([])


def test_torchs_converter_preserves_or_refuses_options() -> None:
    plain = nn.Sequential(normfused.BatchNorm2d(3), normfused.SyncBatchNorm(3))
    assert [type(m) for m in nn.SyncBatchNorm.convert_sync_batchnorm(plain)] == [nn.SyncBatchNorm] * 2
    for layer in (normfused.BatchNormAct2d(3, activation="relu"), normfused.SyncBatchNorm(3, nonfinite="skip")):
        with pytest.raises(AttributeError, match=r"would lose (activation='relu'|nonfinite='skip'); use normfused"):
            nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
        assert not hasattr(layer, "qconfig")


def test_torchs_class_method_creates_our_layers() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), normfused.BatchNormAct2d(3, "silu"), nn.SyncBatchNorm(3))
    for cls in (normfused.SyncBatchNorm, normfused.SyncBatchNormAct):
        assert cls.convert_sync_batchnorm(model, "group") is model
        sync = normfused.SyncBatchNorm
        assert [type(m) for m in model] == [sync, normfused.SyncBatchNormAct, sync]
        assert [m.process_group for m in model] == ["group"] * 3
    assert model[1].activation == "silu"


@pytest.mark.parametrize("cls", [nn.LazyBatchNorm2d, normfused.LazyBatchNorm2d])
def test_a_lazy_layer_is_synchronized_from_its_first_input(cls: type) -> None:
    assert type(normfused.revert(normfused.convert_sync_batchnorm(nn.Sequential(cls())))[0]) is nn.LazyBatchNorm2d
    model = normfused.convert_sync_batchnorm(nn.Sequential(cls()), "group")
    model.eval()(torch.randn(2, 3, 4, 4))  # in evaluation no process group is needed
    assert type(model[0]) is normfused.SyncBatchNorm
    assert (model[0].process_group, model[0].num_features) == ("group", 3)
    normfused.revert(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert set(vars(model[0])) == set(vars(nn.BatchNorm2d(3)))


def test_dataset_statistics_over_ranks(ranks: Ranks) -> None:
    for size in (2, 3):
        ranks.run(size, dataset_statistics)


class Images(torch.utils.data.Dataset[Tensor]):
    def __init__(self, images: Tensor, bad: int = -1) -> None:
        self.images, self.bad, self.read = images, bad, []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        if index == self.bad:
            raise OSError("unreadable")
        self.read.append(index)
        return self.images[index]


def dataset_statistics() -> None:
    world, rank, size = distributed.group.WORLD, distributed.get_rank(), distributed.get_world_size()
    images = torch.randint(0, 256, (23, 3, 5, 4), dtype=torch.uint8)
    expected = normfused.dataset_stats(images, layout="NCHW")
    data = Images(images)
    assert normfused.dataset_stats(data, process_group=world, batch_size=2, layout="CHW") == expected
    assert data.read == list(range(23 * rank // size, 23 * (rank + 1) // size))
    assert normfused.dataset_stats(images, process_group=world, layout="NCHW") == expected
    shares = images[rank::size]
    assert normfused.dataset_stats(iter(shares), process_group=world, layout="CHW") == expected
    assert normfused.ChannelStats().update(shares, "NCHW").all_reduce() == expected
    floats = images.double().div(7)
    stats = normfused.dataset_stats(floats, process_group=world, layout="NCHW")
    assert_equal_on_all_ranks(stats.mean, stats.std)
    assert_close(stats.std, normfused.dataset_stats(floats, layout="NCHW").std, 1e-12)
    fewer = images[:1]  # most ranks have no image
    assert normfused.dataset_stats(fewer, process_group=world, layout="NCHW") == normfused.dataset_stats(
        fewer, layout="NCHW"
    )
    errors = gather_texts(
        error_of(lambda: normfused.dataset_stats(Images(images, bad=2), process_group=world, layout="CHW"))
    )
    assert errors[0] == "RuntimeError: item 2: OSError('unreadable')"
    assert set(errors[1:]) == {"RuntimeError: rank 0: RuntimeError(\"item 2: OSError('unreadable')\")"}
    grey = images[:, : 1 + 2 * (rank == 0)]
    error = error_of(lambda: normfused.dataset_stats(iter(grey), process_group=world, layout="CHW"))
    assert error == "ValueError: rank 1: channels: got 1, but the images before have 3"
    nothing = error_of(lambda: normfused.dataset_stats(images[:0], process_group=world, layout="NCHW"))
    assert nothing == "ValueError: data holds no images"


def gather_texts(text: str) -> list[str]:
    texts = [""] * distributed.get_world_size()
    distributed.all_gather_object(texts, text)
    return texts
