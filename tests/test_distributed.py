"""Batch norm and statistics over real processes."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from common import lay_out
from models import resnet50
from ranks import Ranks
from torch import Tensor, distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import normfused
from normfused import reference
from normfused.convert import kept_for_backward

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


def share(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """This rank's of so many samples for each."""
    return values.split(list(sizes))[distributed.get_rank()].clone()


def everyones(values: Tensor) -> list[Tensor]:
    """Each rank's tensor of the same shape."""
    gathered = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, values.contiguous())
    return gathered


def total(values: Tensor) -> Tensor:
    return torch.stack(everyones(values)).sum(0)


def assert_same_everywhere(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            for other in everyones(tensor):
                assert torch.equal(other.nan_to_num(7.5), tensor.nan_to_num(7.5))


def assert_close(got: Tensor, wanted: Tensor, tolerance: float, name: str = "") -> None:
    assert got.dtype == wanted.dtype or wanted.dtype == torch.float64
    assert got.shape == wanted.shape
    if got.numel():
        error = (got.double() - wanted.double()).abs().max() / max(1.0, wanted.double().abs().max())
        assert error <= tolerance, f"{name} off by {error:.2e}"


def as_one_process(
    sizes: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
    residual: bool = False,
    masked: bool = False,
    tolerance: float = 1e-10,
    parameter_dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Training with the batch shared out by `sizes` gives what one process gives for all of it: outputs, gradients and
    buffers; statistics to the bit on every rank.
    """
    torch.manual_seed(1)
    channels = shape[1]
    n = sum(sizes)
    x, r, grad = (torch.randn(n, *shape[1:]).mul(2).add(3).to(dtype) for _ in range(3))
    present = torch.rand(n, *shape[2:]) < 0.6 if masked else None
    layer = normfused.SyncBatchNorm(channels, dtype=parameter_dtype or dtype, **options)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    alone: dict[str, Any] = {"weight": None, "bias": None, "running_mean": None, "running_var": None}
    for name in alone:
        tensor = getattr(layer, name)
        alone[name] = None if tensor is None else tensor.detach().double().clone()
    for name in ("weight", "bias"):
        if alone[name] is not None:
            alone[name].requires_grad_()

    own = [lay_out(share(t, sizes), layout if len(share(t, sizes)) else "contiguous") for t in (x, r, grad)]
    own_x, own_r = own[0].requires_grad_(), own[1].requires_grad_() if residual else None
    own_mask = share(present, sizes) if present is not None else None
    y = layer(own_x, own_r, own_mask)
    assert y.dtype == dtype
    assert y.stride() == torch.empty_like(reference.with_view(own_x)).stride()
    y.backward(own[2])

    # All of it in float64, positions that are not there left out.
    xs, rs = x.double().requires_grad_(), r.double().requires_grad_() if residual else None
    kept = torch.ones(n, *shape[2:], dtype=torch.bool) if present is None else present
    rows = [None if t is None else t.movedim(1, -1)[kept] for t in (xs, rs)]
    counter = torch.zeros((), dtype=torch.int64)
    wanted_rows = reference.batch_norm(
        rows[0],
        alone["running_mean"],
        alone["running_var"],
        alone["weight"],
        alone["bias"],
        True,
        layer.momentum,
        layer.eps,
        num_batches_tracked=counter,
        residual=rows[1],
        activation=layer.activation or "identity",
        activation_param=reference.ACTIVATION_PARAMS.get(layer.activation or "", 0.0),
    )
    wanted = torch.zeros(n, *shape[2:], channels, dtype=torch.float64)
    wanted = wanted.index_put((kept,), wanted_rows).movedim(-1, 1)
    wanted.backward(grad.double())

    assert_close(y.detach(), share(wanted.detach(), sizes), tolerance)
    assert_close(own_x.grad, share(xs.grad, sizes), tolerance)
    if residual:
        assert_close(own_r.grad, share(rs.grad, sizes), tolerance)
    if layer.affine:
        assert_close(total(layer.weight.grad.double()), alone["weight"].grad, tolerance)
        assert_close(total(layer.bias.grad.double()), alone["bias"].grad, tolerance)
    if layer.running_mean is not None:
        assert_close(layer.running_mean, alone["running_mean"], tolerance)
        assert_close(layer.running_var, alone["running_var"], tolerance)
        assert layer.num_batches_tracked == counter
        assert_same_everywhere(layer.running_mean, layer.running_var, layer.num_batches_tracked)


UNEVEN = {2: (3, 5), 3: (4, 1, 2), 4: (1, 3, 0, 2)}


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 7), (0, 4, 5, 3), (0, 2, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("size", UNEVEN)
def test_b31_as_one_process(ranks: Ranks, size: int, shape: tuple[int, ...]) -> None:
    ranks.run(size, as_one_process, UNEVEN[size], shape)


@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced"])
def test_b34_layouts(ranks: Ranks, layout: str) -> None:
    ranks.run(2, as_one_process, (3, 5), (0, 4, 5, 3), torch.float64, layout, True)


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 2e-6),
        (torch.float16, torch.float32, 1e-3),
        (torch.float16, torch.float16, 2e-3),
        (torch.bfloat16, torch.float32, 8e-3),
        (torch.bfloat16, torch.bfloat16, 1.6e-2),
    ],
    ids=str,
)
def test_b34_dtypes(ranks: Ranks, dtype: torch.dtype, parameter_dtype: torch.dtype, tolerance: float) -> None:
    sizes, shape = (1, 3, 0), (0, 6, 4, 4)
    ranks.run(3, as_one_process, sizes, shape, dtype, "contiguous", True, False, tolerance, parameter_dtype)


OPTIONS = [
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"momentum": None},
    {"bias": False},
    {"eps": 0.5, "momentum": 0.9, "running_var_correction": 0},
]


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_b34_options(ranks: Ranks, options: dict[str, Any]) -> None:
    ranks.run(2, with_options, options)


def with_options(options: dict[str, Any]) -> None:
    as_one_process((2, 3), (0, 3, 4), **options)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_b34_activations_and_residuals(ranks: Ranks, activation: str, residual: bool) -> None:
    ranks.run(2, with_activation, activation, residual)


def with_activation(activation: str, residual: bool) -> None:
    as_one_process((3, 2), (0, 3, 4, 4), residual=residual, activation=activation)


def test_b34_masks(ranks: Ranks) -> None:
    ranks.run(3, with_masks)


def with_masks() -> None:
    as_one_process((3, 2, 1), (0, 3, 7), masked=True)
    as_one_process((3, 2, 1), (0, 3, 4, 4), masked=True, residual=True, activation="relu")
    layer = normfused.SyncBatchNorm(2, dtype=torch.float64)
    x = torch.arange(12.0, dtype=torch.float64).view(1, 2, 6).requires_grad_()
    mask = torch.full((1, 6), distributed.get_rank() != 1)  # rank 1 has nothing
    y = layer(x, mask=mask)
    y.square().sum().backward()
    assert_close(y.detach(), nn.functional.batch_norm(x.detach(), None, None, training=True) * mask, 1e-10)
    assert layer.num_batches_tracked == 1


SIZES = [(3, 5), (1, 1), (4, 0), (0, 4), (1, 0, 1)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1.6e-2)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_b32_shares_of_any_size(ranks: Ranks, sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    for shape in ((0, 3), (0, 3, 4, 4)):
        ranks.run(len(sizes), as_one_process, sizes, shape, dtype, "contiguous", False, False, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_b32_nothing_anywhere(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.run(2, nothing_anywhere, dtype)


def nothing_anywhere(dtype: torch.dtype) -> None:
    layer = normfused.SyncBatchNorm(3)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.zeros(0, 3, 4, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert torch.equal(layer.weight.grad, torch.zeros(3))
    assert torch.equal(layer.bias.grad, torch.zeros(3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 0), (0, 0, 1)], ids=str)
def test_b32_one_value_on_all_ranks_together(ranks: Ranks, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    errors = ranks.run(len(sizes), one_value, sizes, dtype)
    assert len(set(errors)) == 1
    assert errors[0] == (
        "SyncBatchNorm(3): expected more than 1 value per channel when training, got 1 on all ranks together"
    )


def one_value(sizes: tuple[int, ...], dtype: torch.dtype) -> str:
    layer = normfused.SyncBatchNorm(3)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match="more than 1 value") as error:
        layer(torch.zeros(sizes[distributed.get_rank()], 3, dtype=dtype))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    # And they are still together.
    as_one_process((2,) * len(sizes), (0, 3))
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_local_statistics_would_lose(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.run(2, hard_numbers, dtype)


def hard_numbers(dtype: torch.dtype) -> None:
    """A constant channel; one far from zero; one whose squares leave float's range; more values than float16 counts."""
    torch.manual_seed(3)
    largest = 1e25 if dtype == torch.float32 else 6e4
    x = torch.randn(2, 4, 300, 300)
    x[:, 0], x[:, 1], x[:, 2] = 0.1, 1000 + x[:, 1], x[:, 2].clamp(-1, 1) * largest
    x = x.to(dtype)
    layer = normfused.SyncBatchNorm(4, momentum=1.0, dtype=dtype, running_var_correction=0)
    y = layer(x[distributed.get_rank() :][:1])
    wanted = reference.batch_norm(x, None, None, training=True)[distributed.get_rank() :][:1]
    assert torch.equal(y[:, 0], torch.zeros_like(y[:, 0]))
    assert (y.double() - wanted.double()).abs().max() <= (2e-4 if dtype == torch.float32 else 4e-3)
    exact = x.double().transpose(0, 1).flatten(1)
    assert torch.allclose(layer.running_mean.double(), exact.mean(1), rtol=2e-3 if dtype == torch.float16 else 1e-6)


def test_b34_nonfinite_values_are_skipped_by_all(ranks: Ranks) -> None:
    ranks.run(2, nonfinite)


def nonfinite() -> None:
    layer = normfused.SyncBatchNorm(3, nonfinite="skip")
    x = torch.randn(4, 3, 5)
    if distributed.get_rank() == 1:
        x[0, 1, 2] = torch.inf
    layer(x)
    assert layer.nonfinite_batches.tolist() == [0, 1, 0]
    assert (layer.running_mean[1], layer.running_var[1]) == (0, 1)
    assert all(layer.running_var[c] != 1 for c in (0, 2))
    assert_same_everywhere(layer.running_mean, layer.running_var)
    plain = normfused.SyncBatchNorm(3)
    plain(x)
    assert plain.running_var.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
def test_b34_second_derivatives(ranks: Ranks, activation: str, residual: bool) -> None:
    ranks.run(2, second_derivatives, activation, residual)


def second_derivatives(activation: str, residual: bool) -> None:
    sizes, options = (3, 2), {"dtype": torch.float64}
    x, r, grad, u = (torch.randn(5, 3, 4, **options) for _ in range(4))
    weight, bias, v, w = (torch.randn(3, **options) for _ in range(4))

    def grads_of_grads(call: Any, x: Tensor, r: Tensor, grad: Tensor, u: Tensor, *parameters: Tensor) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, r, grad, *parameters)]
        x, r, grad, weight, bias = leaves
        y = call(x, r if residual else None, weight, bias)
        first = torch.autograd.grad(y, [x, weight, bias], grad, create_graph=True)
        mix = (first[0] * u).sum() + (first[1] * v).sum() + (first[2] * w).sum()
        return list(torch.autograd.grad(mix, leaves, allow_unused=True, materialize_grads=True))

    parameter = reference.ACTIVATION_PARAMS.get(activation, 0.0)
    layer = normfused.SyncBatchNorm(3, activation=activation, **options)

    def ours(x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x, r))

    def alone(x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        after: dict[str, Any] = {"residual": r, "activation": activation, "activation_param": parameter}
        return reference.batch_norm(x, None, None, weight, bias, True, **after)

    wanted = grads_of_grads(alone, x, r, grad, u, weight, bias)
    # v and w stand once on the one process: each rank's part of them is the whole, for its own part of the gradients.
    got = grads_of_grads(ours, *(share(t, sizes) for t in (x, r, grad, u)), weight, bias)
    for k, name in enumerate(("input", "residual", "grad_output")):
        assert_close(got[k], share(wanted[k], sizes), 1e-9, name)
    for k in (3, 4):
        assert_close(total(got[k]), wanted[k], 1e-9)


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_only_gradients_that_are_asked_for(ranks: Ranks, activation: str) -> None:
    ranks.run(2, some_gradients, activation)


def some_gradients(activation: str) -> None:
    layer = normfused.SyncBatchNorm(3, activation=activation, dtype=torch.float64)
    x, r, grad = torch.randn(3, 4, 3, 5, dtype=torch.float64)
    wanted: dict[str, Tensor] = {}
    for count in (4, 1, 2, 3):
        for names in itertools.combinations(("input", "residual", "weight", "bias"), count):
            leaves = {"input": x.clone(), "residual": r.clone(), "weight": layer.weight, "bias": layer.bias}
            for name, leaf in leaves.items():
                leaf.requires_grad_(name in names)
                leaf.grad = None
            layer(leaves["input"], leaves["residual"]).backward(grad)
            for name, leaf in leaves.items():
                assert (leaf.grad is not None) == (name in names)
                if name in names:
                    assert torch.equal(leaf.grad, wanted.setdefault(name, leaf.grad.clone()))


def test_b20_a_bit_a_value_is_kept_of_what_relu_took_in(needs_extension: None, ranks: Ranks) -> None:
    for nbytes in ranks.run(2, kept):
        assert nbytes < 16 * 8 * 100 * 4 * 1.05


def kept() -> int:
    layer = normfused.SyncBatchNorm(8, activation="relu")
    x, r = (torch.randn(16, 8, 100, requires_grad=True) for _ in range(2))
    return kept_for_backward(layer, x, r)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "selective"])
def test_b22_checkpointing(ranks: Ranks, needs_extension: None, how: str) -> None:
    ranks.run(2, checkpointed, how)


def checkpointed(how: str) -> None:
    options: dict[str, Any] = {"use_reentrant": how == "reentrant"}
    if how == "selective":
        saved = [torch.ops._c10d_functional.all_gather_into_tensor.default]
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, saved)
    results = []
    for run in (lambda layer, *x: layer(*x), functools.partial(checkpoint, **options)):
        torch.manual_seed(distributed.get_rank())
        layer = normfused.SyncBatchNorm(3, activation="relu")
        x, r = (torch.randn(4, 3, 5, requires_grad=True) for _ in range(2))
        with Traffic() as traffic:
            run(layer, x, r).square().sum().backward()
        results.append([x.grad, r.grad, layer.weight.grad, layer.bias.grad, *layer.state_dict().values()])
    assert all(map(torch.equal, *results))
    assert layer.num_batches_tracked == 1
    assert [name for name, _ in traffic.calls] == [GATHER, *([] if how == "selective" else [GATHER]), REDUCE]


def test_transforms_are_refused(ranks: Ranks) -> None:
    for error in ranks.run(2, transformed):
        assert (
            error == "NotImplementedError: SyncBatchNorm: torch.func and forward-mode differentiation are not supported"
        )


def transformed() -> str:
    layer = normfused.SyncBatchNorm(3)
    return error_of(lambda: torch.func.grad(lambda x: layer(x).sum())(torch.randn(4, 3)))


class Traffic(TorchDispatchMode):
    """The collectives that are called, and the bytes that this rank gives to each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "c10d" in name and "wait_tensor" not in name:
            nbytes = args[0].nbytes if isinstance(args[0], Tensor) else sum(t.nbytes for t in args[0])
            self.calls.append((name.split("::")[1].split(".")[0], nbytes))
        return func(*args, **(kwargs or {}))


GATHER, REDUCE = "all_gather_into_tensor", "all_reduce"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_b33_one_collective_each_way(needs_extension: None, ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.run(2, one_collective_each_way, dtype)


def one_collective_each_way(dtype: torch.dtype) -> None:
    channels, size = 5, 8 if dtype == torch.float64 else 4
    layer = normfused.SyncBatchNorm(channels, dtype=dtype, activation="relu")
    x, r = (torch.randn(3, channels, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    with Traffic() as traffic:
        y = layer(x, r)
        assert traffic.calls == [(GATHER, 2 * channels * size + 8)]  # two statistics a channel, and one int64
        y.sum().backward()
    assert traffic.calls[1:] == [(REDUCE, 2 * channels * size)]
    with Traffic() as traffic:
        layer(x.detach()).sum().backward()  # nobody asks for the input's gradient
    assert [name for name, _ in traffic.calls] == [GATHER]
    with Traffic() as traffic:
        layer.eval()(x).sum().backward()
        layer.train().freeze()(x).sum().backward()
        with normfused.no_stats_update():
            layer(x)
    assert traffic.calls == []
    layer.unfreeze()
    with normfused.no_stats_update(), Traffic() as traffic:  # the batch's statistics still are everyone's
        layer(x)
    assert len(traffic.calls) == 1
    alone = distributed.new_group([0]), distributed.new_group([1])
    layer.process_group = alone[distributed.get_rank()]
    with Traffic() as traffic:
        layer(x).sum().backward()
    assert traffic.calls == []


def test_b33_evaluation_and_one_process_need_no_group() -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    layer, alone = normfused.SyncBatchNorm(3, activation="relu"), normfused.BatchNorm1d(3, activation="relu")
    for training in (True, False):
        got, wanted = layer.train(training)(x), alone.train(training)(x)
        assert torch.equal(got, wanted)
        assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, wanted)))
    assert all(map(torch.equal, layer.state_dict().values(), alone.state_dict().values()))
    assert isinstance(layer, nn.SyncBatchNorm)


@pytest.fixture
def fake_group(request: pytest.FixtureRequest) -> Iterator[None]:
    """A group of so many ranks of which only this one is there."""
    distributed.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("fake_group", [2, 64, 1024], indirect=True, ids=str)
def test_b33_a_whole_network_by_count(needs_extension: None, fake_group: None) -> None:
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


def test_layers_together(needs_extension: None, ranks: Ranks) -> None:
    ranks.run(2, layers_together)


def layers_together() -> None:
    def build() -> list[normfused.SyncBatchNorm]:
        return [normfused.SyncBatchNorm(3), normfused.SyncBatchNorm(5, activation="silu"), normfused.SyncBatchNorm(2)]

    torch.manual_seed(distributed.get_rank())
    shapes = [(4, 3, 6), (2, 5, 3, 3), (7, 2)]
    inputs = [torch.randn(shape) for shape in shapes]
    results = []
    for coalesced in (False, True):
        layers, xs = build(), [x.clone().requires_grad_() for x in inputs]
        residual = torch.ones(shapes[1])
        with Traffic() as traffic:
            if coalesced:
                outputs = normfused.SyncBatchNorm.together(
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
        normfused.SyncBatchNorm.together(list(zip(layers, inputs, strict=True)))
    assert len(traffic.calls) == 1
    layers[0].process_group = distributed.new_group([0, 1])
    with pytest.raises(ValueError, match="different process groups"):
        normfused.SyncBatchNorm.together(list(zip(layers, inputs, strict=True)))


def test_b34_process_groups(ranks: Ranks) -> None:
    ranks.run(4, process_groups)


def process_groups() -> None:
    groups = [distributed.new_group([0, 2]), distributed.new_group([1, 3])]
    rank = distributed.get_rank()
    layer = normfused.SyncBatchNorm(3, process_group=groups[rank % 2], momentum=1.0)
    x = torch.arange(4 * 3 * 5.0).view(4, 3, 5).square()
    layer(x[rank : rank + 1])
    wanted = x[rank % 2 :: 2].transpose(0, 1).flatten(1)
    assert torch.allclose(layer.running_mean, wanted.mean(1))
    assert torch.allclose(layer.running_var, wanted.var(1))
    layer.process_group = groups[(rank + 1) % 2]
    with pytest.raises(RuntimeError, match=r"^SyncBatchNorm\(3\): this process is not in its process group"):
        layer(x)
    layer.process_group = groups[rank % 2]
    distributed.destroy_process_group(groups[rank % 2])
    with pytest.raises(RuntimeError, match=r"^SyncBatchNorm\(3\): its process group is gone"):
        layer(x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_b34_compiled_whole(ranks: Ranks, needs_extension: None, dynamic: bool) -> None:
    ranks.run(2, compiled_whole, dynamic, timeout=300)


def compiled_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(distributed.get_rank())

    def build() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            normfused.SyncBatchNorm(8, activation="relu"),
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
def test_b36_sync_running_stats(ranks: Ranks, mode: str) -> None:
    ranks.run(3, sync_running_stats, mode)


def sync_running_stats(mode: str) -> None:
    torch.manual_seed(distributed.get_rank())
    model = nn.Sequential(
        nn.BatchNorm1d(3), normfused.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3)
    )
    data = torch.randn(3, 6, 3, 4) * torch.arange(1.0, 4).view(3, 1, 1, 1) + torch.arange(3.0).view(3, 1, 1, 1)
    data = everyones(data)[0]
    for layer in model[:2]:
        layer.momentum = 1.0
    own = data[distributed.get_rank()]
    for _ in range(1 + distributed.get_rank()):
        model(own)
    before = [[torch.stack(everyones(b)) for b in (m.running_mean, m.running_var)] for m in model[:2]]
    with Traffic() as traffic:
        normfused.sync_running_stats(model, mode)
    assert len(traffic.calls) == 1
    assert_same_everywhere(*model.state_dict().values())
    for layer, (means, variances) in zip(model[:2], before, strict=True):
        mean, variance = (means[0], variances[0]) if mode == "broadcast" else (means.mean(0), variances.mean(0))
        if mode == "pooled":
            variance = variance + means.var(0, correction=0)
        assert torch.allclose(layer.running_mean, mean)
        assert torch.allclose(layer.running_var, variance)
        assert layer.num_batches_tracked == (1 if mode == "broadcast" else 3)


def test_b36_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"^sync_running_stats: mode must be one of .*, pooled, got 'sum'$"):
        normfused.sync_running_stats(nn.BatchNorm1d(3), "sum")
    with pytest.raises(RuntimeError, match="needs a process group"):
        normfused.sync_running_stats(nn.BatchNorm1d(3))


def error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


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
def test_b35_ranks_that_diverge_raise(ranks: Ranks, difference: str) -> None:
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
        assert first.endswith("where rank 1 has not come within 2 s")
        assert second == ""


def diverge(difference: str) -> str:
    model = Two()
    x = torch.randn(4, 3, 5, requires_grad=True)
    for _ in range(4):  # together so far
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
    time.sleep(3)  # while the other waits
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
    # Rank 0 knows of nothing, but does not wait for ever.
    assert errors[0].startswith("RuntimeError: SyncBatchNorm(3): the ranks' exchange failed: ")


def other_channels(other: int = 1) -> str:
    channels = 6 if distributed.get_rank() == other else 3
    return error_of(lambda: normfused.SyncBatchNorm(channels)(torch.randn(4, channels)))


def other_dtype() -> str:
    dtype = torch.float64 if distributed.get_rank() == 1 else torch.float32
    return error_of(lambda: normfused.SyncBatchNorm(3, dtype=dtype)(torch.randn(4, 3, dtype=dtype)))


@pytest.mark.parametrize("size", [2, 3])
def test_ddp_trains_as_one_process(ranks: Ranks, size: int) -> None:
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
    for wanted, got in zip(alone.state_dict().values(), shared.state_dict().values(), strict=True):
        assert_close(got, wanted, 1e-9)
        assert_same_everywhere(got)


def test_ddp_still_refuses_torchs_own_on_the_cpu(ranks: Ranks) -> None:
    assert ranks.run(2, ddp_of_torchs_own) == ["ValueError: SyncBatchNorm layers only work with GPU modules"] * 2


def ddp_of_torchs_own() -> str:
    return error_of(lambda: nn.parallel.DistributedDataParallel(nn.Sequential(nn.SyncBatchNorm(3))))


def test_convert_and_revert() -> None:
    class Custom(nn.BatchNorm2d):
        pass

    shared = nn.BatchNorm2d(3, momentum=None).eval()
    model = nn.Sequential(
        shared, normfused.BatchNorm1d(3, activation="relu", nonfinite="skip"), nn.SyncBatchNorm(3), Custom(3)
    )
    model.append(nn.Sequential(shared, nn.BatchNorm3d(3, affine=False).half()))
    model[1].weight.requires_grad_(False)
    hook = model[1].register_forward_hook(lambda *_: None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    parameters = list(map(id, model.parameters()))
    with pytest.warns(RuntimeWarning, match="leaves 3 alone: Custom is not one of"):
        assert normfused.convert_sync_batchnorm(model, "group") is model
    sync = normfused.SyncBatchNorm
    assert [type(m) for m in model] == [sync, sync, sync, Custom, nn.Sequential]
    assert [m.path for m in model.modules() if isinstance(m, sync)] == ["0", "1", "2", "4.1"]
    assert all(m.process_group == "group" for m in model.modules() if isinstance(m, sync))
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


def test_convert_refuses_layers_in_place_before_it_changes_any() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), normfused.BatchNorm1d(3, activation="leaky_relu", inplace=True))
    with pytest.raises(ValueError, match=r"^convert_sync_batchnorm: 1 has inplace=True, and cannot be synchronized$"):
        normfused.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d
    with pytest.raises(ValueError, match="inplace=True is for layers that are not synchronized"):
        normfused.SyncBatchNorm(3, inplace=True)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        normfused.convert_sync_batchnorm([])


def test_b24_torchs_converter_keeps_or_refuses() -> None:
    plain = nn.Sequential(normfused.BatchNorm2d(3), normfused.SyncBatchNorm(3))
    assert [type(m) for m in nn.SyncBatchNorm.convert_sync_batchnorm(plain)] == [nn.SyncBatchNorm] * 2
    for layer in (normfused.BatchNorm2d(3, activation="relu"), normfused.SyncBatchNorm(3, nonfinite="skip")):
        with pytest.raises(TypeError, match=r"torch's converters would drop (activation='relu'|nonfinite='skip')"):
            nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
        layer.qconfig = None  # as torch.ao.quantization says that a layer is to be left alone
        assert layer.qconfig is None
        assert copy.deepcopy(layer).qconfig is None


def test_b37_dataset_statistics_over_ranks(ranks: Ranks) -> None:
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
    wanted = normfused.dataset_stats(images, layout="NCHW")
    data = Images(images)
    assert normfused.dataset_stats(data, group=world, batch_size=2, layout="CHW") == wanted
    assert data.read == list(range(23 * rank // size, 23 * (rank + 1) // size))
    assert normfused.dataset_stats(images, group=world, layout="NCHW") == wanted
    shares = images[rank::size]
    assert normfused.dataset_stats(iter(shares), group=world, layout="CHW") == wanted
    assert normfused.ChannelStats().update(shares, "NCHW").all_reduce() == wanted
    floats = images.double().div(7)
    stats = normfused.dataset_stats(floats, group=world, layout="NCHW")
    assert_same_everywhere(stats.mean, stats.std())
    assert_close(stats.std(), normfused.dataset_stats(floats, layout="NCHW").std(), 1e-12)
    fewer = images[:1]  # of which most ranks have nothing
    assert normfused.dataset_stats(fewer, group=world, layout="NCHW") == normfused.dataset_stats(fewer, layout="NCHW")
    errors = everyones_text(error_of(lambda: normfused.dataset_stats(Images(images, bad=2), group=world, layout="CHW")))
    assert errors[0] == "RuntimeError: item 2: OSError('unreadable')"
    assert set(errors[1:]) == {"RuntimeError: rank 0: RuntimeError(\"item 2: OSError('unreadable')\")"}
    grey = images[:, : 1 + 2 * (rank == 0)]
    error = error_of(lambda: normfused.dataset_stats(iter(grey), group=world, layout="CHW"))
    assert error == "ValueError: rank 1: channels: got 1, but the images before have 3"
    nothing = error_of(lambda: normfused.dataset_stats(images[:0], group=world, layout="NCHW"))
    assert nothing == "ValueError: data holds no images"


def everyones_text(text: str) -> list[str]:
    texts = [""] * distributed.get_world_size()
    distributed.all_gather_object(texts, text)
    return texts
