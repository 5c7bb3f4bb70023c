"""What ranks are about to do, compared before they do it, by way of the process group's store.

Each layer once, because collectives of different sizes hang, or end the process: channels and kind of statistics. With
``NORMFUSED_SYNC_DEBUG=1`` in the environment every step: ranks that differ, or wait for one that does not come, then
raise instead of hanging. What compilers run is not compared.
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
    """A process group, and this process's rank in it."""

    name: str
    size: int
    rank: int


class _State:
    """What this process has compared in a group."""

    def __init__(self, process_group: Any) -> None:
        self.is_real = distributed.get_backend(process_group) != "fake"  # where there is nobody else, and no store
        self.turn = 0
        self.met: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


_states: WeakKeyDictionary[Any, _State] = WeakKeyDictionary()
_naming = False


def is_enabled() -> bool:
    """Whether every step is to be compared."""
    return os.environ.get("NORMFUSED_SYNC_DEBUG") == "1" and not torch.compiler.is_compiling()


def check_once(group: Group, layer: nn.Module, what: str) -> None:
    """The first time that ``layer`` comes with ``what``, compare it with what the ranks on either side come with.

    Raises:
        RuntimeError: another rank comes with something else, or not before the store's timeout.
    """
    if torch.compiler.is_compiling():
        return
    met = _state_of(group).met.setdefault(layer, set())
    if what not in met:
        _compare(group, what, {(group.rank + step) % group.size for step in (1, -1)}, None)
        met.add(what)


def check_all(group: Group, what: str) -> None:
    """Compare ``what`` with all ranks.

    Raises:
        RuntimeError: another rank is at something else, or does not come within ``NORMFUSED_SYNC_DEBUG_TIMEOUT``.
    """
    patience = float(os.environ.get("NORMFUSED_SYNC_DEBUG_TIMEOUT", "30"))
    _compare(group, what, set(range(group.size)) - {group.rank}, patience)


def _state_of(group: Group) -> _State:
    process_group = resolve_process_group(group.name)
    return _states.get(process_group) or _states.setdefault(process_group, _State(process_group))


def _compare(group: Group, what: str, others: set[int], patience: float | None) -> None:
    state = _state_of(group)
    if not state.is_real:
        return
    store = prefix_store(f"normfused/{group.name}")
    if patience is None:
        patience = store.timeout.total_seconds()
    state.turn += 1
    store.set(f"{state.turn}/{group.rank}", what)
    deadline = monotonic() + patience
    for rank in sorted(others):
        key = f"{state.turn}/{rank}"
        try:
            store.wait([key], timedelta(seconds=max(deadline - monotonic(), 0.01)))
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {group.rank} is at {what}, where rank {rank} has not come within {patience:g} s"
            ) from error
        there = store.get(key).decode()
        if there != what:
            raise RuntimeError(f"ranks diverge: rank {group.rank} is at {what}, rank {rank} at {there}")
    # Whoever has come to a turn has read all that it reads of the one before.
    if state.turn > 2:
        store.delete_key(f"{state.turn - 2}/{group.rank}")


def name_layers(kind: type[nn.Module]) -> None:
    """From the next call of a model on, while steps are compared, its layers of this kind know their ``path`` in it."""
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
