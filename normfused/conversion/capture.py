"""Calls of a converted model through Dynamo. Each module with norms is captured from a frame of its own.

``nn.Module.__call__`` calls the attribute ``_compiled_call_impl`` if a module has it; ``nn.Module.compile`` sets it.
Dynamo skips frames of torch.nn, so it would capture a plain ``nn.Sequential`` child by child. The functions here are
frames outside of torch.nn, from which Dynamo captures the module that they call as a whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from normfused import _torch_private
from normfused.conversion import fusion
from normfused.conversion.report import ConversionReport

# Captures of one module: for training, evaluation, gradient modes, autocast, and static and dynamic sizes.
RECOMPILE_LIMIT = 64

_CONFIG = {
    "accumulated_recompile_limit": 4096,
    # Code that Dynamo cannot capture runs uncompiled, and raises its own errors.
    "suppress_errors": True,
    "fail_on_recompile_limit_hit": False,
    # Hooks that are added to a module after a capture cause a new capture.
    "skip_nnmodule_hook_guards": False,
    # Otherwise Dynamo would draw NumPy's random numbers from torch's generator.
    "trace_numpy": False,
    # No graph breaks at the buckets of DistributedDataParallel: autograd is eager, so gradients overlap anyway.
    "optimize_ddp": False,
    "capture_scalar_outputs": False,
    "capture_dynamic_output_shape_ops": False,
}


def install(model: nn.Module, report: ConversionReport) -> None:
    """Call each module of ``model`` that contains norms of this package through Dynamo."""
    norms: dict[int | None, str] = {id(layer): path for path, layer in report.layers(model)}
    for module in _holders(model):
        _torch_private.set_compiled_call(module, _entry(module, report, norms))


def uninstall(model: nn.Module) -> None:
    """Undo :func:`install`. Modules that the user has compiled stay compiled."""
    for module in model.modules():
        if is_installed(module):
            _torch_private.set_compiled_call(module, None)


def is_installed(module: nn.Module) -> bool:
    """Whether calls of ``module`` are captured by :func:`install`."""
    call = _torch_private.compiled_call(module)
    return isinstance(call, FunctionType) and hasattr(call, "normfused_report")


def _holders(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that contain a norm of this package, without the layers themselves and lists of modules."""
    from normfused.conversion.classes import is_ours

    for module in model.modules():
        compiled = _torch_private.compiled_call(module) is not None and not is_installed(module)
        if is_ours(module) or compiled or type(module) in (nn.ModuleList, nn.ModuleDict):
            continue
        if any(map(is_ours, module.modules())):
            yield module


def _with_own_code(function: Any) -> Any:
    """A copy of ``function`` with its own code object: Dynamo stores and counts captures for each code object."""
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return copy


def _entry(module: Any, report: ConversionReport, norms: dict[int | None, str]) -> Callable[..., Any]:
    """The function that ``module.__call__`` calls."""
    compiled: Callable[..., Any] | None = None
    configure: Callable[[], Callable[[], None]] | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    def compile_for(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return _backend(gm, report, norms)

    def enter(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the module is part of a larger graph
            return module._call_impl(*args, **kwargs)
        nonlocal compiled, configure
        caller: Any = sys._getframe(1).f_locals.get("self")
        if caller is not module and _torch_private.compiled_call(caller) is entry:
            return caller._call_impl(*args, **kwargs)  # a shallow copy of the module, as nn.DataParallel makes
        report.eager_reason = _torch_private.eager_reason()
        if report.eager_reason is not None:
            return module._call_impl(*args, **kwargs)
        if compiled is None:
            compiled = _torch_private.compile_apart(_with_own_code(call), compile_for, RECOMPILE_LIMIT)
            configure = _torch_private.dynamo_patcher(**_CONFIG, recompile_limit=RECOMPILE_LIMIT)
        assert configure is not None
        undo, refused = configure(), _torch_private.captures_refused()
        try:
            return compiled(*args, **kwargs)
        finally:
            undo()
            if _torch_private.captures_refused() != refused:
                report.warn_of_limit(RECOMPILE_LIMIT)

    entry: Callable[..., Any] = _with_own_code(enter)
    entry.normfused_report = report  # type: ignore[attr-defined]
    return entry


def _backend(gm: fx.GraphModule, report: ConversionReport, norms: dict[int | None, str]) -> Callable[..., Any]:
    fusion.check_is_flat(gm)
    outcomes = fusion.fuse(gm, report.inplace)
    # A norm without a layer is a call of a function.
    report.record({norms.get(layer, "functional"): outcome for layer, outcome in outcomes.items()})
    fusion.run_directly(gm)
    return gm.forward
