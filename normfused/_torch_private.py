"""The private functions of torch that the package uses, each with what it does where torch lacks it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from normfused.checks import is_transformed

_Function = Callable[..., Any]

_GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and name.endswith("_hooks") and isinstance(hooks, dict)
]


def why_eager() -> str | None:
    """What is at work, if anything, that Dynamo's captures would not see, or that must see the module calls itself."""
    if torch._C._get_tracing_state() is not None:
        return "under torch.jit.trace"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "under a dispatch mode, such as those of make_fx and FakeTensorMode"
    if torch.fx._symbolic_trace._is_fx_tracing_flag:
        return "under torch.fx.symbolic_trace"
    if any(_GLOBAL_HOOKS):
        return "with hooks on all modules"
    return "under torch.func or forward-mode differentiation" if is_transformed() else None


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


def captures_refused() -> int:
    """How many captures Dynamo has refused in this process because of its limit.

    They are found by the text of the refusal; of a torch that says it in other words there are none.
    """
    from torch._dynamo.utils import counters

    return sum(n for text, n in counters["unimplemented"].items() if text.startswith("Dynamo recompile limit"))


def dynamo_patcher(**changes: Any) -> Callable[[], Callable[[], None]]:
    """A function that sets entries of Dynamo's configuration in this thread, and returns one that undoes it.

    Entries that this torch lacks are left out. ``config.patch`` and its faster sibling do the same, but also see to a
    hash of the configuration, by which compiled code is cached on disk. There is none here, and this runs in each call.
    """
    import torch._dynamo

    config: Any = torch._dynamo.config
    changes = {name: value for name, value in changes.items() if hasattr(config, name)}
    entries: dict[str, Any] = getattr(config, "_config", {})
    overrides: list[tuple[Any, Any]] = [
        (getattr(entries.get(name), "user_override", None), value) for name, value in changes.items()
    ]
    if all(isinstance(variable, ContextVar) for variable, _ in overrides):

        def set_overrides() -> Callable[[], None]:
            tokens = [(variable, variable.set(value)) for variable, value in overrides]

            def reset() -> None:
                for variable, token in tokens:
                    variable.reset(token)

            return reset

        return set_overrides

    def patch() -> Callable[[], None]:
        patched = config.patch(**changes)
        patched.__enter__()
        return lambda: patched.__exit__(None, None, None)

    return patch


def register_decomposition(operator: torch._ops.OpOverload, table: str) -> Callable[[_Function], _Function]:
    """Add a function to one of torch's tables of decompositions; nothing where torch has none."""
    register = getattr(torch._decomp, "register_decomposition", None)
    return register(operator, type=table) if register else lambda function: function


def call_from_inductor(operator: torch._ops.OpOverload) -> None:
    """Let Inductor, where it is imported, call ``operator`` although torch knows a decomposition of it.

    It would do so by itself, but raises where the environment variable ``CI`` is set.
    """
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    if lowering is None or operator in lowering.lowerings:
        return
    tag = torch._library.utils.get_layout_constraint_tag(operator)
    lowering.make_fallback(operator, layout_constraint=lowering.tag_to_layout_constraint(tag), warn=False)
