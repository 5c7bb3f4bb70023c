"""The private functions and classes of torch that the package uses.

Each has one wrapper here. Without a name in :data:`REQUIRED`, on which correct results depend, this module raises an
``ImportError`` that names it. For every other name the wrapper states what it does if the installed torch lacks it.
``torch._check`` needs no wrapper: torch's guides to dynamic shapes and export document it for users.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils import _pytree
from torch.utils.data._utils import worker

_Function = Callable[..., Any]

REQUIRED = (
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack",
    "torch.utils._pytree.tree_flatten",
    "torch.utils._pytree.tree_map_only",
    "torch.utils._pytree.tree_unflatten",
    "torch.utils.data._utils.worker",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.instancenorm._InstanceNorm",
    "torch.nn.modules.module._global_backward_hooks",
    "torch.nn.modules.module._global_backward_pre_hooks",
    "torch.nn.modules.module._global_forward_hooks",
    "torch.nn.modules.module._global_forward_pre_hooks",
    "torch._ops.OpOverload",
    "torch._ops.OpOverloadPacket",
    "torch._ops.HigherOrderOperator",
    "torch._ops.OpOverloadPacket._schemas",
    "torch.ops.aten.relu.default._schema",
    "torch._C._current_graph_task_id",
    "torch._C._functorch.TransformType",
    "torch._C._functorch.get_interpreter_stack",
    "torch._C._functorch.get_unwrapped",
    "torch._C._functorch.is_batchedtensor",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.maybe_current_level",
    "torch._C._get_tracing_state",
    "torch._C._len_torch_dispatch_stack",
    "torch._debug_has_internal_overlap",
    "torch._prims_common.suggest_memory_format",
    "torch._functionalize_sync",
    "torch._is_functional_tensor",
    "torch.Tensor._base",
    "torch.Tensor._is_view",
    "torch.UntypedStorage._cdata",
    "torch.autograd.forward_ad._current_level",
    "torch.nn.Module._call_impl",
)


def _missing(names: Iterable[str]) -> list[str]:
    """Those of the names that this torch lacks."""

    def exists(name: str) -> bool:
        found: Any = torch
        for part in name.split(".")[1:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True

    return [name for name in names if not exists(name)]


if _lacking := _missing(REQUIRED):
    raise ImportError(f"normfused uses {', '.join(_lacking)}, which torch {torch.__version__} does not have")

# Base classes without public names: of BatchNorm1d/2d/3d and SyncBatchNorm; of these and the instance norms.
BatchNormBase = nn.modules.batchnorm._BatchNorm
NormBase = nn.modules.batchnorm._NormBase
InstanceNormBase = nn.modules.instancenorm._InstanceNorm

OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket
HigherOrderOperator = torch._ops.HigherOrderOperator

suggest_memory_format = torch._prims_common.suggest_memory_format
# Faster than the public function.
is_jit_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]


def _assert_sync(condition: Tensor, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


# Checks a 0-d tensor without waiting for the device; without torch's function, waits.
assert_async: Callable[[Tensor, str], None] = getattr(torch, "_assert_async", _assert_sync)

# ---- transforms and autograd -----------------------------------------------------------------------------------------


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is active. In-place operators have no derivative there."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def is_in_functorch() -> bool:
    """Whether a transform of torch.func is active."""
    return torch._C._functorch.maybe_current_level() is not None


def is_functionalized() -> bool:
    """Whether :func:`torch.func.functionalize` is active."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(interpreter.key() == torch._C._functorch.TransformType.Functionalize for interpreter in stack)


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation follows this tensor."""
    if forward_ad._current_level < 0:
        return False
    tangent: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return tangent is not None


def is_in_backward() -> bool:
    """Whether this thread is inside a backward pass. False while compiling, because compiled code runs later."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements of ``tensor`` certainly share memory, as those of an expanded tensor do."""
    return torch._debug_has_internal_overlap(tensor) == 1


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func wraps ``tensor``. False while compiling, because Dynamo cannot trace this."""
    if torch.compiler.is_compiling():
        return False
    return torch._is_functional_tensor(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_batched(tensor: Tensor) -> bool:
    """Whether :func:`torch.func.vmap` batches ``tensor``, at any level."""
    while is_wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def write_buffer(buffer: Tensor, values: Tensor) -> None:
    """Copy ``values`` into ``buffer``. If only ``values`` are wrapped by transforms, write below the transforms."""
    if not is_wrapped(values) or is_wrapped(buffer):
        buffer.copy_(values)
        return
    while is_wrapped(values):
        if torch._is_functional_tensor(values):
            torch._functionalize_sync(values)
        values = torch._C._functorch.get_unwrapped(values)
    with temporarily_clear_interpreter_stack():
        buffer.copy_(values)


def view_base(tensor: Tensor) -> Tensor | None:
    """The tensor that ``tensor`` is a view of; ``tensor`` itself if it is no view."""
    return tensor._base if tensor._is_view() else tensor


def saves_its_result(tensor: Tensor) -> bool:
    """Whether the operator that made ``tensor`` saves it for backward.

    False if this torch does not show it. After such a tensor is overwritten, backward raises torch's own error.
    """
    # hasattr finds a property of the node's class. Reading it could unpack a saved tensor.
    return hasattr(tensor.grad_fn, "_raw_saved_result")


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``tree``, nested tuples, lists and dicts, with ``function`` applied to each tensor."""
    return _pytree.tree_map_only(Tensor, function, tree)


flatten_tree = _pytree.tree_flatten  # nested tuples, lists and dicts to a list of leaves and their structure
unflatten_tree = _pytree.tree_unflatten


def below_autograd() -> Any:
    """A context in which operators skip autograd. It saves time only, and without torch's class does nothing."""
    skip = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
    return skip()


# ---- process groups --------------------------------------------------------------------------------------------------


def _c10d(name: str) -> Any:
    """The function of that name in ``torch.distributed.distributed_c10d``; a ``RuntimeError`` if torch lacks it."""
    path = f"torch.distributed.distributed_c10d.{name}"
    if _missing([path]):
        raise RuntimeError(f"SyncBatchNorm uses {path}, which torch {torch.__version__} does not have")
    return getattr(distributed.distributed_c10d, name)


def resolve_process_group(name: str) -> Any:
    """The process group of that name."""
    return _c10d("_resolve_process_group")(name)


def prefix_store(prefix: str) -> Any:
    """The key-value store of the default process group, for keys that begin with ``prefix``."""
    store: Any = distributed.PrefixStore(prefix, _c10d("_get_default_store")())  # type: ignore[attr-defined]
    return store


def patch_ddp_check(replace: Callable[[_Function], _Function]) -> None:
    """Replace ``DistributedDataParallel``'s check for SyncBatchNorm. No effect if this torch has no such check."""
    ddp: Any = nn.parallel.DistributedDataParallel
    check = getattr(ddp, "_passing_sync_batchnorm_handle", None)
    if check is not None:
        ddp._passing_sync_batchnorm_handle = replace(check)


# ---- quantization ----------------------------------------------------------------------------------------------------


def quantization_tables() -> tuple[dict[Any, Any], dict[Any, Any]] | None:
    """The tables of fuser methods and of static quantization in ``torch.ao.quantization``; None if torch lacks them."""
    try:
        from torch.ao.quantization.fuser_method_mappings import _DEFAULT_OP_LIST_TO_FUSER_METHOD as FUSERS
        from torch.ao.quantization.quantization_mappings import DEFAULT_STATIC_QUANT_MODULE_MAPPINGS as STATIC
    except ImportError:
        return None
    return FUSERS, STATIC


# ---- Dynamo ----------------------------------------------------------------------------------------------------------

_GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and name.endswith("_hooks") and isinstance(hooks, dict)
]


def _is_fx_tracing() -> bool:
    """Whether torch.fx.symbolic_trace is active. torch 2.6 has the flag only, torch 2.14 the function only."""
    module: Any = torch.fx._symbolic_trace
    if hasattr(module, "is_fx_symbolic_tracing"):
        return bool(module.is_fx_symbolic_tracing())
    return bool(module._is_fx_tracing_flag)


def eager_reason() -> str | None:
    """Why this call must not be captured, as a phrase that follows "calls"; ``None`` if it can be captured.

    Dynamo does not see these states, or they have to see the module calls themselves.
    """
    if torch._C._get_tracing_state() is not None:
        return "under torch.jit.trace"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "under a dispatch mode, such as those of make_fx and FakeTensorMode"
    if _is_fx_tracing():
        return "under torch.fx.symbolic_trace"
    if any(_GLOBAL_HOOKS):
        return "with hooks on all modules"
    return "under torch.func or forward-mode differentiation" if is_transformed() else None


def dynamo_unavailable_reason() -> str | None:
    """Why Dynamo cannot capture anything in this process; ``None`` if it can."""
    if not hasattr(nn.Module, "_compiled_call_impl"):
        return f"torch {torch.__version__} has no torch.nn.Module._compiled_call_impl"
    if getattr(torch._dynamo.config, "disable", False):
        return "Dynamo is disabled"
    try:
        torch.compile(lambda: None, backend="eager")
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def lookup_backend(name: str) -> Callable[..., Any]:
    """The compiler backend of that name."""
    lookup: Any = getattr(torch._dynamo, "lookup_backend", None)
    if lookup is None:
        raise RuntimeError(f"torch {torch.__version__} cannot look up the backend {name!r}: pass the function instead")
    backend: Callable[..., Any] = lookup(name)
    return backend


def skip_frame(message: str) -> Exception:
    """The exception by which a backend tells Dynamo to run a frame uncompiled.

    A ``RuntimeError``, which ends the call, if this torch has none.
    """
    skip: type[Exception] | None = getattr(torch._dynamo.exc, "SkipFrame", None)
    return skip(message) if skip else RuntimeError(f"{message}, which torch {torch.__version__} has no exception for")


def compiled_call(module: Any) -> Any:
    """The function that ``module.__call__`` runs in place of the module's own call, as ``module.compile()`` sets it."""
    return getattr(module, "_compiled_call_impl", None)


def set_compiled_call(module: Any, function: Callable[..., Any] | None) -> None:
    """Have ``module.__call__`` run ``function``; ``None`` restores the module's own call."""
    if function is None:
        del module._compiled_call_impl
    else:
        module._compiled_call_impl = function


def compile_apart(function: Callable[..., Any], backend: Callable[..., Any], limit: int) -> Callable[..., Any]:
    """``torch.compile(function)``, with a limit on its own captures only.

    Before torch 2.13 captures are counted for each code object, and the limit is that of Dynamo's configuration.
    """
    make: Any = torch.compile
    known = inspect.signature(make).parameters
    apart = {"recompile_limit": limit, "isolate_recompiles": True}
    compiled: Callable[..., Any] = make(
        function, backend=backend, **{name: value for name, value in apart.items() if name in known}
    )
    return compiled


def captures_refused() -> int:
    """Number of captures that Dynamo has refused in this process because of its limit.

    Refusals are recognized by their text. The number is 0 if this torch words it differently, or does not count.
    """
    counters: Any = getattr(torch._dynamo.utils, "counters", {})
    refusals: dict[str, int] = counters.get("unimplemented", {})
    return sum(n for text, n in refusals.items() if text.startswith("Dynamo recompile limit"))


def dynamo_patcher(**changes: Any) -> Callable[[], Callable[[], None]]:
    """A function that sets entries of Dynamo's configuration in this thread. It returns a function that undoes it.

    Entries that this torch lacks are left out. ``config.patch`` does the same, but also updates a hash of the
    configuration, which is the key of compiled code cached on disk. No such code exists here, and this function runs in
    each call.
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
    """A decorator that adds a decomposition to one of torch's tables. No effect if this torch has no such tables.

    It replaces one of this operator, which the table has if the package is imported a second time.
    """
    register = getattr(torch._decomp, "register_decomposition", None)
    getattr(torch._decomp, "global_decomposition_table", {}).get(table, {}).pop(operator, None)
    return register(operator, type=table) if register else lambda function: function


def call_from_inductor(operator: torch._ops.OpOverload) -> None:
    """Let Inductor, if it is imported, call ``operator`` although torch has a decomposition of it.

    Inductor does so by default, but raises if the environment variable ``CI`` is set. No effect if a function of
    Inductor's is missing.
    """
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    if lowering is None or operator in getattr(lowering, "lowerings", ()):
        return
    with suppress(AttributeError):
        tag = torch._library.utils.get_layout_constraint_tag(operator)
        lowering.make_fallback(operator, layout_constraint=lowering.tag_to_layout_constraint(tag), warn=False)


@contextmanager
def watched_worker_info() -> Iterator[Callable[[], bool]]:
    """In the worker of a DataLoader, a context whose value tells whether ``get_worker_info()`` was used in it.

    Always True if torch lacks the private variable.
    """
    if not hasattr(worker, "_worker_info"):
        yield lambda: True
        return
    info = worker._worker_info
    used = False

    class Watched:
        def __getattr__(self, name: str) -> Any:
            nonlocal used
            used = True
            return getattr(info, name)

    worker._worker_info = Watched()  # type: ignore[assignment]
    try:
        yield lambda: used
    finally:
        worker._worker_info = info
