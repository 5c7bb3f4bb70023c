"""Activation checkpointing: a training step updates the running statistics once, although it recomputes forward."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import normfused

BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def block(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = (normfused.BatchNormAct1d if "activation" in options else normfused.BatchNorm1d)(4, **options)
    return nn.Sequential(nn.Conv1d(3, 4, 3), layer, nn.Conv1d(4, 2, 3))


def step(model: nn.Module, run: Callable[..., Tensor]) -> list[Tensor]:
    """Run one training step. Returns its gradients and the buffers."""
    torch.manual_seed(1)
    x = torch.randn(5, 3, 9, requires_grad=True)
    run(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same_step(model: nn.Module, run: Callable[..., Tensor], plain: nn.Module) -> None:
    for a, e in zip(step(model, run), step(plain, plain), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    assert all(int(count) == 1 for name, count in model.named_buffers() if "num_batches" in name)


def selective() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.convolution.default])


def skip_unsupported_by_torch(how: dict[str, Any], options: dict[str, Any], backend: str | None = None) -> None:
    if "context_fn" in how and (options.get("inplace") or backend == "aot_eager"):
        pytest.skip("selective checkpointing raises for outputs that are overwritten, and for functionalized operators")


HOW = [{"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "context_fn": selective}]
how = pytest.mark.parametrize("how", HOW, ids=["reentrant", "not reentrant", "selective"])
options = pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None, "nonfinite": "skip"}, {"inplace": True, "activation": "leaky_relu"}],
    ids=["plain", "cumulative", "inplace"],
)


# ---- torch.utils.checkpoint ------------------------------------------------------------------------------------------


@how
@options
def test_an_eager_layer_updates_once(how: dict[str, Any], options: dict[str, Any]) -> None:
    skip_unsupported_by_torch(how, options)
    model = block(**options)
    assert_same_step(model, functools.partial(checkpoint, model, **how), block(**options))


@pytest.mark.exhaustive
@how
@options
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_layer_updates_once(backend: str, how: dict[str, Any], options: dict[str, Any]) -> None:
    skip_unsupported_by_torch(how, options, backend)
    model = block(**options)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same_step(model, functools.partial(checkpoint, compiled, **how), block(**options))


@pytest.mark.exhaustive
@how
@options
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])  # "eager" raises for any mutated buffer, as for torch.nn
def test_a_checkpoint_inside_compiled_code_updates_once(
    backend: str, how: dict[str, Any], options: dict[str, Any]
) -> None:
    model = block(**options)

    def run(x: Tensor) -> Tensor:
        result: Tensor = checkpoint(model, x, **how)
        return result

    assert_same_step(model, torch.compile(run, backend=backend, fullgraph=True), block(**options))


@pytest.mark.usefixtures("needs_extension")
def test_an_operator_in_place_whose_results_are_saved_is_refused() -> None:
    model = block(inplace=True)
    saved = [torch.ops.normfused.batch_norm_training_.default]
    context = functools.partial(create_selective_checkpoint_contexts, saved)
    y = checkpoint(model, torch.randn(5, 3, 9, requires_grad=True), use_reentrant=False, context_fn=context)
    with pytest.raises(RuntimeError, match="selective checkpointing must recompute them"):
        y.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_fallback_compiled_updates_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normfused._extension, "C", None)
    model = block(nonfinite="skip")
    compiled = torch.compile(model, backend=backend)
    assert_same_step(model, functools.partial(checkpoint, compiled, use_reentrant=False), block(nonfinite="skip"))


@pytest.mark.parametrize("compiled", [False, True])
def test_masked_positions_are_counted_once(compiled: bool) -> None:
    layer = normfused.BatchNorm1d(3)
    run = torch.compile(layer, backend="eager") if compiled else layer
    x, mask = torch.randn(4, 3, 5, requires_grad=True), torch.rand(4, 5) > 0.5
    checkpoint(run, x, None, mask, use_reentrant=False).square().sum().backward()
    plain = normfused.BatchNorm1d(3)
    plain(x, None, mask)
    for a, e in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_synchronized_layers_update_once(ranks: Ranks, reentrant: bool, compiled: bool) -> None:
    ranks.run(2, synchronized_step, reentrant, compiled)


def synchronized_step(reentrant: bool, compiled: bool) -> None:
    torch.compiler.reset()
    layer, plain = normfused.SyncBatchNorm(3), normfused.SyncBatchNorm(3)
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    x = torch.randn(5, 3, 4, requires_grad=True)
    checkpoint(run, x, use_reentrant=reentrant).square().sum().backward()
    plain(x)
    assert all(torch.equal(a, e) for a, e in zip(layer.buffers(), plain.buffers(), strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_nested_checkpoints_update_once(compiled: bool) -> None:
    model = block()
    inner = torch.compile(model, backend="aot_eager") if compiled else model

    def outer(x: Tensor) -> Tensor:
        result: Tensor = checkpoint(inner, x, use_reentrant=False)
        return result.relu()

    def plain(x: Tensor) -> Tensor:
        result: Tensor = expected(x)
        return result.relu()

    expected = block()
    got = step(model, functools.partial(checkpoint, outer, use_reentrant=False))
    for a, e in zip(got, step(expected, plain), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_two_backward_passes_over_a_checkpoint_update_once(compiled: bool) -> None:
    layer = normfused.BatchNorm1d(3)
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    x = torch.randn(5, 3, requires_grad=True)
    y = checkpoint(run, x, use_reentrant=False)
    y.square().sum().backward(retain_graph=True)
    y.sum().backward()
    assert int(layer.num_batches_tracked) == 1


def test_a_second_derivative_through_a_checkpoint_updates_once() -> None:
    layer = normfused.BatchNorm1d(3)
    x = torch.randn(5, 3, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_no_stats_update_covers_the_recomputation(compiled: bool) -> None:
    layer = normfused.BatchNorm1d(3)
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    with normfused.no_stats_update():
        y = checkpoint(run, torch.randn(5, 3, requires_grad=True), use_reentrant=False)
    y.square().sum().backward()
    assert int(layer.num_batches_tracked) == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))


# ---- wrappers that update the statistics during recomputation --------------------------------------------------------


class _Recomputed(torch.autograd.Function):
    """A forward pass without gradients, which backward runs again with gradients."""

    @staticmethod
    def forward(ctx: Any, trigger: Tensor, module: nn.Module, x: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            result: Tensor = module(x)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.module(x)
        torch.autograd.backward(y, grad)
        return None, None, x.grad


class LateUpdates(nn.Module):
    """A checkpoint wrapper that disables tracking in passes without gradients, so that the recomputation updates."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not hasattr(layer, "tracked_before"):
                layer.tracked_before = []
                layer.register_forward_pre_hook(self.before)
                layer.register_forward_hook(self.after)

    @staticmethod
    def before(layer: Any, _: Any) -> None:
        layer.tracked_before.append(layer.track_running_stats)
        if not torch.is_grad_enabled():
            layer.track_running_stats = False

    @staticmethod
    def after(layer: Any, *_: Any) -> None:
        layer.track_running_stats = layer.tracked_before.pop()

    def forward(self, x: Tensor) -> Tensor:
        trigger = torch.empty(0, requires_grad=True)
        result: Tensor = _Recomputed.apply(trigger, self.module, x)  # type: ignore[no-untyped-call]
        return result


@options
def test_a_late_update_is_made_once(options: dict[str, Any]) -> None:
    model = block(**options)
    assert_same_step(model, LateUpdates(model), block(**options))


def test_late_updates_of_torchs_own_layer_are_made_once() -> None:
    """The wrapper works with torch.nn's layer."""
    model, plain = (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    assert_same_step(model, LateUpdates(model), plain)


def test_late_updates_of_nested_wrappers_are_made_once() -> None:
    model = block()
    nested = LateUpdates(nn.Sequential(LateUpdates(model), nn.ReLU()))
    x = torch.randn(5, 3, 9, requires_grad=True)
    nested(x).square().sum().backward()
    assert int(model[1].num_batches_tracked) == 1


def test_late_updates_of_several_forwards_are_all_made() -> None:
    model = block()
    wrapped = LateUpdates(model)
    losses = [wrapped(torch.randn(5, 3, 9, requires_grad=True)).square().sum() for _ in range(3)]
    assert int(model[1].num_batches_tracked) == 0
    torch.stack(losses).sum().backward()
    assert int(model[1].num_batches_tracked) == 3


def test_a_late_update_is_not_made_under_no_stats_update() -> None:
    model = block()
    with normfused.no_stats_update():
        y = LateUpdates(model)(torch.randn(5, 3, 9, requires_grad=True))
    y.square().sum().backward()
    assert int(model[1].num_batches_tracked) == 0


def test_a_late_update_is_not_repeated_by_a_second_backward_pass() -> None:
    model = block()
    y = LateUpdates(model)(torch.randn(5, 3, 9, requires_grad=True))
    y.sum().backward(retain_graph=True)
    y.square().sum().backward()
    assert int(model[1].num_batches_tracked) == 1


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_forward_pass_without_tracking_leaves_no_pending_update(with_gradients: bool) -> None:
    layer = normfused.BatchNorm1d(3)
    layer.track_running_stats = False
    with torch.set_grad_enabled(with_gradients):
        layer(torch.randn(5, 3))
    layer.track_running_stats = True
    checkpoint(layer, torch.randn(5, 3, requires_grad=True), use_reentrant=False).sum().backward()
    assert int(layer.num_batches_tracked) == 1


def test_late_updates_of_a_compiled_layer_are_made_once() -> None:
    layer = normfused.BatchNorm1d(3)
    wrapped = LateUpdates(layer)
    wrapped.module = torch.compile(layer, backend="aot_eager")
    for steps in (1, 2):
        wrapped(torch.randn(5, 3, requires_grad=True)).square().sum().backward()
        assert int(layer.num_batches_tracked) == steps


def test_late_updates_survive_copies() -> None:
    model = block()
    wrapped = LateUpdates(copy.deepcopy(model))
    wrapped(torch.randn(5, 3, 9, requires_grad=True)).square().sum().backward()
    assert int(wrapped.module[1].num_batches_tracked) == 1
