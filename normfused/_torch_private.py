"""The private functions of torch that the package uses, each with what it does where torch lacks it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from normfused.checks import is_transformed

_GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and name.endswith("_hooks") and isinstance(hooks, dict)
]


def must_run_eagerly() -> bool:
    """Whether something is at work that Dynamo's captures would not see, or that must see the module calls itself.

    :mod:`torch.fx` and ``torch.jit.trace`` recording them, :mod:`torch.func`, forward-mode differentiation, dispatch
    modes, such as those of ``make_fx`` and ``FakeTensorMode``, and hooks on all modules.
    """
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return bool(torch.fx._symbolic_trace._is_fx_tracing_flag) or any(_GLOBAL_HOOKS) or is_transformed()


def compile_apart(function: Callable[..., Any], backend: Callable[..., Any], limit: int) -> Callable[..., Any]:
    """``torch.compile(function)`` whose captures are counted apart from all others, up to ``limit``.

    Before torch 2.13 they are counted by code object, and the limit is that of Dynamo's configuration.
    """
    make: Any = torch.compile
    known = inspect.signature(make).parameters
    apart = {"recompile_limit": limit, "isolate_recompiles": True}
    compiled: Callable[..., Any] = make(
        function, backend=backend, **{name: value for name, value in apart.items() if name in known}
    )
    return compiled


def dynamo_patcher(**changes: Any) -> Callable[[], Callable[[], None]]:
    """A function that sets entries of Dynamo's configuration, and returns one that undoes it.

    Entries that this torch lacks are left out.
    """
    import torch._dynamo

    config: Any = torch._dynamo.config
    changes = {name: value for name, value in changes.items() if hasattr(config, name)}
    if hasattr(config, "_make_closure_patcher"):
        patcher: Callable[[], Callable[[], None]] = config._make_closure_patcher(**changes)
        return patcher

    def change() -> Callable[[], None]:
        patch = config.patch(**changes)
        patch.__enter__()
        return lambda: patch.__exit__(None, None, None)

    return change
