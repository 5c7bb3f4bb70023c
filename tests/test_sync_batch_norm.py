"""SyncBatchNorm on several processes equals batch norm of the whole batch in one process."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from common import lay_out
from on_ranks import GATHER, REDUCE, Traffic, assert_close, assert_equal_on_all_ranks, error_of, share, total
from ranks import Ranks
from torch import Tensor, distributed, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import normfused
from normfused import reference
from normfused.activations import ACTIVATION_PARAMS, ACTIVATIONS
from normfused.conversion import bytes_saved_for_backward
from normfused.layout import as_dense

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")


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
    """Training with rank r having `sizes[r]` samples equals training in one process: outputs, gradients, buffers.
    Running statistics are bitwise identical on all ranks.
    """
    torch.manual_seed(1)
    channels = shape[1]
    n = sum(sizes)
    x, r, grad = (torch.randn(n, *shape[1:]).mul(2).add(3).to(dtype) for _ in range(3))
    present = torch.rand(n, *shape[2:]) < 0.6 if masked else None
    cls = normfused.SyncBatchNormAct if "activation" in options else normfused.SyncBatchNorm
    layer = cls(channels, dtype=parameter_dtype or dtype, **options)
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
    assert y.stride() == torch.empty_like(as_dense(own_x)).stride()
    y.backward(own[2])

    # The whole batch in float64, without the masked positions.
    xs, rs = x.double().requires_grad_(), r.double().requires_grad_() if residual else None
    valid = torch.ones(n, *shape[2:], dtype=torch.bool) if present is None else present
    rows = [None if t is None else t.movedim(1, -1)[valid] for t in (xs, rs)]
    counter = torch.zeros((), dtype=torch.int64)
    expected_rows = reference.batch_norm(
        rows[0],
        alone["running_mean"],
        alone["running_var"],
        alone["weight"],
        alone["bias"],
        True,
        layer.momentum,
        layer.epsilon,
        num_batches_tracked=counter,
        residual=rows[1],
        activation=layer.activation or "identity",
        activation_param=ACTIVATION_PARAMS.get(layer.activation or "", 0.0),
    )
    expected = torch.zeros(n, *shape[2:], channels, dtype=torch.float64)
    expected = expected.index_put((valid,), expected_rows).movedim(-1, 1)
    expected.backward(grad.double())

    assert_close(y.detach(), share(expected.detach(), sizes), tolerance)
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
        assert_equal_on_all_ranks(layer.running_mean, layer.running_var, layer.num_batches_tracked)


UNEVEN = {2: (3, 5), 3: (4, 1, 2), 4: (1, 3, 0, 2)}


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 7), (0, 4, 5, 3), (0, 2, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("size", UNEVEN)
def test_as_one_process(ranks: Ranks, size: int, shape: tuple[int, ...]) -> None:
    ranks.run(size, as_one_process, UNEVEN[size], shape)


@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced"])
def test_layouts(ranks: Ranks, layout: str) -> None:
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
def test_dtypes(ranks: Ranks, dtype: torch.dtype, parameter_dtype: torch.dtype, tolerance: float) -> None:
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
def test_options(ranks: Ranks, options: dict[str, Any]) -> None:
    ranks.run(2, with_options, options)


def with_options(options: dict[str, Any]) -> None:
    as_one_process((2, 3), (0, 3, 4), **options)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_and_residuals(ranks: Ranks, activation: str, residual: bool) -> None:
    ranks.run(2, with_activation, activation, residual)


def with_activation(activation: str, residual: bool) -> None:
    as_one_process((3, 2), (0, 3, 4, 4), residual=residual, activation=activation)


def test_masks(ranks: Ranks) -> None:
    ranks.run(3, with_masks)


def with_masks() -> None:
    as_one_process((3, 2, 1), (0, 3, 7), masked=True)
    as_one_process((3, 2, 1), (0, 3, 4, 4), masked=True, residual=True, activation="relu")
    layer = normfused.SyncBatchNorm(2, dtype=torch.float64)
    x = torch.arange(12.0, dtype=torch.float64).view(1, 2, 6).requires_grad_()
    mask = torch.full((1, 6), distributed.get_rank() != 1)  # rank 1 has no positions
    y = layer(x, mask=mask)
    y.square().sum().backward()
    assert_close(y.detach(), nn.functional.batch_norm(x.detach(), None, None, training=True) * mask, 1e-10)
    assert layer.num_batches_tracked == 1


SIZES = [(3, 5), (1, 1), (4, 0), (0, 4), (1, 0, 1)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1.6e-2)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_shares_of_any_size(ranks: Ranks, sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    for shape in ((0, 3), (0, 3, 4, 4)):
        ranks.run(len(sizes), as_one_process, sizes, shape, dtype, "contiguous", False, False, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_empty_batch_on_all_ranks(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.run(2, empty_on_all_ranks, dtype)


def empty_on_all_ranks(dtype: torch.dtype) -> None:
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
def test_one_value_on_all_ranks_together(ranks: Ranks, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
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
    # The ranks can continue together.
    as_one_process((2,) * len(sizes), (0, 3))
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_for_which_naive_statistics_fail(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.run(2, hard_numbers, dtype)


def hard_numbers(dtype: torch.dtype) -> None:
    """A constant channel; one far from zero; one whose squares overflow float; a count that overflows float16."""
    torch.manual_seed(3)
    largest = 1e25 if dtype == torch.float32 else 6e4
    x = torch.randn(2, 4, 300, 300)
    x[:, 0], x[:, 1], x[:, 2] = 0.1, 1000 + x[:, 1], x[:, 2].clamp(-1, 1) * largest
    x = x.to(dtype)
    layer = normfused.SyncBatchNorm(4, momentum=1.0, dtype=dtype, running_var_correction=0)
    y = layer(x[distributed.get_rank() :][:1])
    expected = reference.batch_norm(x, None, None, training=True)[distributed.get_rank() :][:1]
    assert torch.equal(y[:, 0], torch.zeros_like(y[:, 0]))
    assert (y.double() - expected.double()).abs().max() <= (2e-4 if dtype == torch.float32 else 4e-3)
    exact = x.double().transpose(0, 1).flatten(1)
    assert torch.allclose(layer.running_mean.double(), exact.mean(1), rtol=2e-3 if dtype == torch.float16 else 1e-6)


def test_nonfinite_values_are_skipped_by_all(ranks: Ranks) -> None:
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
    assert_equal_on_all_ranks(layer.running_mean, layer.running_var)
    plain = normfused.SyncBatchNorm(3)
    plain(x)
    assert plain.running_var.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
def test_second_derivatives(ranks: Ranks, activation: str, residual: bool) -> None:
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

    parameter = ACTIVATION_PARAMS.get(activation, 0.0)
    layer = normfused.SyncBatchNormAct(3, activation=activation, **options)

    def ours(x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x, r))

    def alone(x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        after: dict[str, Any] = {"residual": r, "activation": activation, "activation_param": parameter}
        return reference.batch_norm(x, None, None, weight, bias, True, **after)

    expected = grads_of_grads(alone, x, r, grad, u, weight, bias)
    # v and w are not divided: each rank multiplies its part of the parameter gradients by all of them.
    got = grads_of_grads(ours, *(share(t, sizes) for t in (x, r, grad, u)), weight, bias)
    for k, name in enumerate(("input", "residual", "grad_output")):
        assert_close(got[k], share(expected[k], sizes), 1e-9, name)
    for k in (3, 4):
        assert_close(total(got[k]), expected[k], 1e-9)


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_only_requested_gradients(ranks: Ranks, activation: str) -> None:
    ranks.run(2, some_gradients, activation)


def some_gradients(activation: str) -> None:
    layer = normfused.SyncBatchNormAct(3, activation=activation, dtype=torch.float64)
    x, r, grad = torch.randn(3, 4, 3, 5, dtype=torch.float64)
    first: dict[str, Tensor] = {}
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
                    assert torch.equal(leaf.grad, first.setdefault(name, leaf.grad.clone()))


def test_relu_saves_one_bit_per_element(needs_extension: None, ranks: Ranks) -> None:
    for nbytes in ranks.run(2, saved_bytes):
        assert nbytes < 16 * 8 * 100 * 4 * 1.05


def saved_bytes() -> int:
    layer = normfused.SyncBatchNormAct(8, activation="relu")
    x, r = (torch.randn(16, 8, 100, requires_grad=True) for _ in range(2))
    return bytes_saved_for_backward(layer, x, r)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "selective"])
def test_checkpointing(ranks: Ranks, needs_extension: None, how: str) -> None:
    ranks.run(2, checkpointed, how)


def checkpointed(how: str) -> None:
    options: dict[str, Any] = {"use_reentrant": how == "reentrant"}
    if how == "selective":
        saved = [torch.ops._c10d_functional.all_gather_into_tensor.default]
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, saved)
    results = []
    for run in (lambda layer, *x: layer(*x), functools.partial(checkpoint, **options)):
        torch.manual_seed(distributed.get_rank())
        layer = normfused.SyncBatchNormAct(3, activation="relu")
        x, r = (torch.randn(4, 3, 5, requires_grad=True) for _ in range(2))
        with Traffic() as traffic:
            run(layer, x, r).square().sum().backward()
        results.append([x.grad, r.grad, layer.weight.grad, layer.bias.grad, *layer.state_dict().values()])
    assert all(map(torch.equal, *results))
    assert layer.num_batches_tracked == 1
    assert [name for name, _ in traffic.calls] == [GATHER, *([] if how == "selective" else [GATHER]), REDUCE]


def test_transforms_are_refused(ranks: Ranks) -> None:
    refused = "NotImplementedError: SyncBatchNorm: torch.func and forward-mode differentiation are not supported"
    for errors in ranks.run(2, transformed):
        assert errors == [refused] * len(errors)


def transformed() -> list[str]:
    """Transforms of the forward pass, and of the backward pass of an existing graph."""
    layer = normfused.SyncBatchNorm(3)
    x = torch.randn(4, 3, requires_grad=True)
    y = layer(x)

    def gradient(g: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y, x, g, retain_graph=True)[0]

    def dual(function: Any) -> Any:
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(torch.randn(4, 3), torch.randn(4, 3)))

    g = torch.randn(4, 3)
    return [
        error_of(lambda: torch.func.grad(lambda x: layer(x).sum())(g)),
        error_of(lambda: dual(layer)),
        error_of(lambda: dual(gradient)),
        error_of(lambda: torch.func.jvp(gradient, (g,), (g,))),
        error_of(lambda: torch.func.vmap(gradient)(torch.stack([g, g]))),
    ]
