"""Checks that all ranks are about to do the same, via the key-value store of the process group.

Collectives whose sizes differ between ranks hang, or end the process. So each layer is checked once, before its first
collective: number of channels and dtype of the statistics. With ``NORMFUSED_SYNC_DEBUG=1`` in the environment every
step is checked, and ranks that differ, or wait for a rank that does not arrive, raise instead of hanging. Compiled code
is not checked.
"""

from __future__ import annotations

import os
from datetime import timedelta
from time import monotonic
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import distributed, nn

from normfused._torch_private import prefix_store, resolve_process_group


class Group(NamedTuple):
    """A process group, and the rank of this process in it."""

    name: str
    size: int
    rank: int


class _State:
    """The checks of this process in one group."""

    def __init__(self, process_group: Any) -> None:
        self.is_real = distributed.get_backend(process_group) != "fake"  # which has no other ranks and no store
        self.step = 0
        self.checked: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


_states: WeakKeyDictionary[Any, _State] = WeakKeyDictionary()
_naming = False


def is_enabled() -> bool:
    """Whether every step is checked."""
    return os.environ.get("NORMFUSED_SYNC_DEBUG") == "1" and not torch.compiler.is_compiling()


def check_once(group: Group, layer: nn.Module, what: str) -> None:
    """Compare ``what``, a description of the layer's next step, with the neighboring ranks; once for each value.

    Raises:
        RuntimeError: a neighbor has another value, or does not arrive before the timeout of the store.
    """
    if torch.compiler.is_compiling():
        return
    checked = _state_of(group).checked.setdefault(layer, set())
    if what not in checked:
        _compare(group, what, {(group.rank + step) % group.size for step in (1, -1)}, None)
        checked.add(what)


def check_all(group: Group, what: str) -> None:
    """Compare ``what``, a description of the next step, with all ranks.

    Raises:
        RuntimeError: a rank has another value, or does not arrive within ``NORMFUSED_SYNC_DEBUG_TIMEOUT`` seconds.
    """
    timeout = float(os.environ.get("NORMFUSED_SYNC_DEBUG_TIMEOUT", "30"))
    _compare(group, what, set(range(group.size)) - {group.rank}, timeout)


def _state_of(group: Group) -> _State:
    process_group = resolve_process_group(group.name)
    return _states.get(process_group) or _states.setdefault(process_group, _State(process_group))


def _compare(group: Group, what: str, others: set[int], timeout: float | None) -> None:
    state = _state_of(group)
    if not state.is_real:
        return
    store = prefix_store(f"normfused/{group.name}")
    if timeout is None:
        timeout = store.timeout.total_seconds()
    state.step += 1
    store.set(f"{state.step}/{group.rank}", what)
    deadline = monotonic() + timeout
    for rank in sorted(others):
        key = f"{state.step}/{rank}"
        try:
            store.wait([key], timedelta(seconds=max(deadline - monotonic(), 0.01)))
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {group.rank} is at {what}, but rank {rank} has not arrived within {timeout:g} s"
            ) from error
        other = store.get(key).decode()
        if other != what:
            raise RuntimeError(f"ranks diverge: rank {group.rank} is at {what}, rank {rank} at {other}")
    # A rank that has arrived at a step has read all keys of the step before. So older keys can be deleted.
    if state.step > 2:
        store.delete_key(f"{state.step - 2}/{group.rank}")


def name_layers(kind: type[nn.Module]) -> None:
    """Set ``path`` of all layers of this class, at the next call of a model, as long as every step is checked."""
    global _naming
    if _naming:
        return
    _naming = True

    def name_all(module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if not is_enabled():
            stop()
        elif not isinstance(module, kind):
            for path, layer in module.named_modules():
                if isinstance(layer, kind) and not layer.path:
                    layer.path = path

    def stop() -> None:
        global _naming
        _naming = False
        handle.remove()

    handle = nn.modules.module.register_module_forward_pre_hook(name_all)
