"""Positions excluded by ``mask`` or ``lengths``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from common import assert_same_bits, lay_out
from on_ranks import share
from ranks import Ranks
from torch import Tensor, distributed, nn

import normfused

modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
residuals = pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
backends = pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("aot_eager", "inductor"))]
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@modes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@residuals
def test_a_mask_equals_gathering_the_positions(
    with_residual: bool, layout: str, training: bool, device: torch.device
) -> None:
    """The values at excluded positions, here NaN, do not matter."""
    layer = normfused.BatchNormAct2d(3, activation="relu", dtype=torch.float64, device=device).train(training)
    layer.running_mean.normal_()
    other = copy.deepcopy(layer)
    mask = torch.rand(4, 5, 6, device=device) > 0.4
    x, residual, grad = (torch.randn(4, 3, 5, 6, dtype=torch.float64, device=device) for _ in range(3))
    x, residual = (t.masked_fill(~mask.unsqueeze(1), torch.nan) for t in (x, residual))
    x, residual, grad = (lay_out(t, layout).requires_grad_() for t in (x, residual, grad))
    residual = residual if with_residual else None
    y = layer(x, residual, mask)
    assert y.stride() == layer.eval()(x).stride()
    layer.train(training)
    assert not y.movedim(1, -1)[~mask].any()

    rows = [
        None if t is None else t.detach().movedim(1, -1)[mask].unsqueeze(2).unsqueeze(3).requires_grad_()
        for t in (x, residual)
    ]
    gathered = other(*rows)
    torch.testing.assert_close(y.movedim(1, -1)[mask], gathered[:, :, 0, 0])
    inputs = [t for t in (x, residual) if t is not None]
    gathered_inputs = [t for t in rows if t is not None]
    ours = torch.autograd.grad(y, [*inputs, *layer.parameters()], grad)
    theirs = torch.autograd.grad(
        gathered, [*gathered_inputs, *other.parameters()], grad.movedim(1, -1)[mask][:, :, None, None]
    )
    for a, e in zip(ours[: len(inputs)], theirs, strict=False):
        assert not a.movedim(1, -1)[~mask].any()
        torch.testing.assert_close(a.movedim(1, -1)[mask], e[:, :, 0, 0])
    for a, e in zip(ours[len(inputs) :], theirs[len(inputs) :], strict=True):
        torch.testing.assert_close(a, e)
    for a, e in zip(layer.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, e)


@modes
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_lengths_equal_a_mask(dtype: torch.dtype, training: bool) -> None:
    layer = normfused.BatchNorm1d(3).train(training)
    other = copy.deepcopy(layer)
    x, lengths = torch.randn(4, 3, 6), torch.tensor([6, 2, 0, 5], dtype=dtype)
    mask = torch.arange(6) < lengths.unsqueeze(1)
    assert_same_bits(layer(x, lengths=lengths), other(x, mask=mask))
    assert_same_bits(layer.running_var, other.running_var)


def test_lengths_on_the_cpu_work_with_any_device(device: torch.device) -> None:
    layer = normfused.BatchNorm1d(3, device=device)
    x, lengths = torch.randn(4, 3, 6, device=device), torch.tensor([6, 2, 0, 5])
    assert_same_bits(copy.deepcopy(layer)(x, lengths=lengths), layer(x, lengths=lengths.to(device)))


@pytest.mark.parametrize("arguments", [{"mask": torch.zeros(4, 6).bool()}, {"lengths": torch.zeros(4).long()}], ids=str)
def test_no_position_at_all_gives_zeros_in_evaluation(arguments: dict[str, Tensor]) -> None:
    layer = normfused.BatchNormAct1d(3, activation="sigmoid").eval()
    x = torch.randn(4, 3, 6, requires_grad=True)
    y = layer(x, **arguments)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(4, 3, 6))
    assert x.grad is not None
    assert not x.grad.any()
    assert not layer.bias.grad.any()


@pytest.mark.parametrize("make", [normfused.BatchNorm1d, normfused.SyncBatchNorm])
@modes
def test_an_empty_batch_with_a_mask_is_empty(make: Callable[..., nn.Module], training: bool) -> None:
    y = make(3).train(training)(torch.empty(0, 3, 6), mask=torch.empty(0, 6, dtype=torch.bool))
    assert y.shape == (0, 3, 6)


# ---- refused ---------------------------------------------------------------------------------------------------------

X, SEQUENCES = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 6)


def of_images(**arguments: Any) -> tuple[Callable[..., nn.Module], Tensor, dict[str, Any]]:
    return normfused.BatchNorm2d, X, arguments


def of_sequences(lengths: Any, **arguments: Any) -> tuple[Callable[..., nn.Module], Tensor, dict[str, Any]]:
    return normfused.BatchNorm1d, SEQUENCES, {"lengths": lengths, **arguments}


Case = tuple[Callable[..., nn.Module], Tensor, dict[str, Any]]
BAD: list[tuple[Case, type[Exception], str]] = [
    (
        (normfused.BatchNorm2d, X[0], {"mask": torch.ones(4, 5, dtype=torch.bool)}),
        ValueError,
        "expected a 4D input, got 3D input of shape (3, 5, 5)",
    ),
    (
        of_images(mask=torch.ones(4, 5, dtype=torch.bool)),
        ValueError,
        "mask must have the shape of input without its channels, (4, 5, 5), got (4, 5)",
    ),
    (of_images(mask=torch.ones(4, 5, 5)), TypeError, "mask must be a bool tensor, got torch.float32"),
    (of_images(mask=torch.ones(4, 5, 5).long()), TypeError, "mask must be a bool tensor, got torch.int64"),
    (of_images(mask=[[True]]), TypeError, "mask must be a bool tensor, got list"),
    (
        of_images(mask=torch.ones(4, 5, 5, dtype=torch.bool, device="meta")),
        ValueError,
        "mask is on meta, but input is on cpu",
    ),
    (of_sequences([1, 2, 3, 4]), TypeError, "lengths must be an integer tensor, got list"),
    (of_sequences(6), TypeError, "lengths must be an integer tensor, got int"),
    (of_sequences(torch.ones(4)), TypeError, "lengths must be an integer tensor, got torch.float32"),
    (of_sequences(torch.ones(4).bool()), TypeError, "lengths must be an integer tensor, got torch.bool"),
    (of_sequences(torch.ones(4).cfloat()), TypeError, "lengths must be an integer tensor, got torch.complex64"),
    (of_sequences(torch.ones(4).to(torch.uint32)), TypeError, "lengths must be an integer tensor, got torch.uint32"),
    (
        of_sequences(torch.ones(3).long()),
        ValueError,
        "lengths must have shape (N,) for an input of shape (N, C, L), got (3,) for (4, 3, 6)",
    ),
    (
        of_sequences(torch.ones(4, 1).long()),
        ValueError,
        "lengths must have shape (N,) for an input of shape (N, C, L), got (4, 1) for (4, 3, 6)",
    ),
    (
        (normfused.BatchNorm1d, SEQUENCES[:, :, 0], {"lengths": torch.ones(4).long()}),
        ValueError,
        "lengths must have shape (N,) for an input of shape (N, C, L), got (4,) for (4, 3)",
    ),
    (
        of_sequences(torch.ones(4, dtype=torch.int64, device="meta")),
        ValueError,
        "lengths is on meta, but input is on cpu",
    ),
    (
        of_sequences(torch.tensor([7, 1, 1, 1])),
        ValueError,
        "lengths must be from 0 to 6, the length of input, got [7, 1, 1, 1]",
    ),
    (
        of_sequences(torch.tensor([1, 1, 1, -1])),
        ValueError,
        "lengths must be from 0 to 6, the length of input, got [1, 1, 1, -1]",
    ),
    (
        of_sequences(torch.ones(4).long(), mask=torch.ones(4, 6, dtype=torch.bool)),
        ValueError,
        "mask and lengths exclude each other, got both",
    ),
]
TRAINING_ONLY: list[tuple[Case, type[Exception], str]] = [
    (of_images(mask=torch.zeros(4, 5, 5, dtype=torch.bool)), ValueError, "mask has no valid position"),
    (of_sequences(torch.zeros(4).long()), ValueError, "mask has no valid position"),
    (
        of_sequences(torch.tensor([1, 0, 0, 0])),
        ValueError,
        "expected more than 1 value per channel when training, got input of shape (1, 3); use a bigger batch, put the "
        "module in eval mode, or drop the last incomplete batch (DataLoader(drop_last=True))",
    ),
]
CASES = [(*bad, training) for training in (True, False) for bad in (BAD + TRAINING_ONLY if training else BAD)]


@pytest.mark.parametrize(("case", "kind", "message", "training"), CASES, ids=[f"{c[2][:50]}-{c[3]}" for c in CASES])
def test_bad_arguments_change_nothing(case: Case, kind: type[Exception], message: str, training: bool) -> None:
    make, x, arguments = case
    layer = make(3).train(training)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(kind) as error:
        layer(x, **arguments)
    assert str(error.value) == f"{make.__name__}: {message}"  # type: ignore[attr-defined]
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("case", "kind", "message"), BAD[2:5] + BAD[6:], ids=[bad[2][:50] for bad in BAD[2:5] + BAD[6:]]
)
def test_synchronized_layers_refuse_the_same(case: Case, kind: type[Exception], message: str) -> None:
    _, x, arguments = case
    with pytest.raises(kind) as error:
        normfused.SyncBatchNorm(3)(x, **arguments)
    assert str(error.value) == f"SyncBatchNorm: {message}"


# ---- compiled --------------------------------------------------------------------------------------------------------


@modes
@residuals
@pytest.mark.parametrize("dynamic", [False, True])
@backends
@pytest.mark.usefixtures("needs_extension")
def test_compiled_in_one_graph_is_eager(backend: str, dynamic: bool, with_residual: bool, training: bool) -> None:
    layer = normfused.BatchNormAct1d(3, activation="relu").train(training)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for length in (6, 7):
        x, residual = (torch.randn(4, 3, length, requires_grad=True) for _ in range(2))
        residual = residual if with_residual else None
        for arguments in ({"mask": torch.rand(4, length) > 0.5}, {"lengths": torch.tensor([1, 0, 6, 3])}):
            results = []
            for function, module in ((compiled, layer), (plain, plain)):
                module.zero_grad()
                x.grad = None
                y = function(x, residual, **arguments)
                y.square().sum().backward()
                results.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
            for a, e in zip(*results, strict=True):
                assert_same_bits(a, e)


COMPILED_BAD = [
    ({"lengths": torch.tensor([1, 2, 3, 7])}, True, "BatchNorm1d: lengths must be from 0 to 6, the length of input"),
    ({"lengths": torch.tensor([1, 2, 3, -1])}, False, "BatchNorm1d: lengths must be from 0 to 6, the length of input"),
    ({"lengths": torch.zeros(4).long()}, True, "BatchNorm1d: mask has less than 2 valid positions"),
    ({"lengths": torch.tensor([1, 0, 0, 0])}, True, "BatchNorm1d: mask has less than 2 valid positions"),
    ({"mask": torch.zeros(4, 6).bool()}, True, "BatchNorm1d: mask has less than 2 valid positions"),
]


@backends
@pytest.mark.parametrize(("arguments", "training", "message"), COMPILED_BAD)
@pytest.mark.usefixtures("needs_extension")
def test_compiled_code_checks_values_at_run_time(
    arguments: dict[str, Tensor], training: bool, message: str, backend: str
) -> None:
    layer = normfused.BatchNorm1d(3).train(training)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=f"^{message}"):
        torch.compile(layer, fullgraph=True, backend=backend)(SEQUENCES, **arguments)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@modes
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.usefixtures("needs_extension")
def test_exported_is_eager(strict: bool, training: bool) -> None:
    layer = normfused.BatchNorm1d(3).train(training)
    plain = copy.deepcopy(layer)
    program = torch.export.export(layer, (SEQUENCES,), {"lengths": torch.tensor([1, 2, 3, 6])}, strict=strict).module()
    for lengths in (torch.tensor([0, 4, 6, 1]), torch.tensor([6, 6, 6, 6])):
        assert_same_bits(program(SEQUENCES, lengths=lengths), plain(SEQUENCES, lengths=lengths))
    with pytest.raises(RuntimeError, match=r"^BatchNorm1d: lengths must be from 0 to 6"):
        program(SEQUENCES, lengths=torch.tensor([1, 2, 3, 7]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("compiled", [False, True])
@modes
def test_synchronized_layers_with_lengths(ranks: Ranks, needs_extension: None, training: bool, compiled: bool) -> None:
    ranks.run(2, with_lengths, training, compiled)


def with_lengths(training: bool, compiled: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = normfused.SyncBatchNorm(3).train(training)
    whole = normfused.BatchNorm1d(3).train(training)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    for lengths in (torch.tensor([1, 0, 6, 3]), torch.tensor([6, 5, 0, 0])):  # the second has no positions on rank 1
        x = torch.randn(4, 3, 6)
        own = share(x, (2, 2)).requires_grad_()
        y = run(own, lengths=share(lengths, (2, 2)))
        y.square().sum().backward()
        x.requires_grad_()
        expected = whole(x, lengths=lengths)
        expected.square().sum().backward()
        torch.testing.assert_close(y, share(expected, (2, 2)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own.grad, share(x.grad, (2, 2)), rtol=1e-4, atol=1e-5)
        for a, e in zip(layer.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert distributed.get_world_size() == 2
