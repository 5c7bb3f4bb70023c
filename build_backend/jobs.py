"""The number of compilers to run in parallel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MEMORY_OF_A_JOB = 2**31


def default_jobs(root: Path = Path("/")) -> int:
    """Return the number of cores, limited by memory: one compiler needs up to 2 GiB.

    Limits of the cgroup, such as those of a container, are respected.
    """
    cores, memory = [_cores()], []
    with suppress(AttributeError, OSError, ValueError):  # not on every system
        memory.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for folder in _cgroups(root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            memory += _numbers(folder / name)[:1]
        quota = _numbers(folder / "cpu.max") or _numbers(folder / "cpu.cfs_quota_us") + _numbers(
            folder / "cpu.cfs_period_us"
        )
        if len(quota) == 2 and quota[0] > 0:
            cores.append(quota[0] // quota[1])
    return max(1, min([*cores, *(size // MEMORY_OF_A_JOB for size in memory)]))


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _cgroups(root: Path) -> Iterator[Path]:
    """The folders with this process's limits: version 1 has one for each controller, version 2 one for all."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and not {"memory", "cpu"} & set(controllers.split(",")):
            continue
        top = root / "sys/fs/cgroup" / controllers
        inner = top / path.lstrip("/")
        # In a container, the path may be the host's; the container's own limits are then at the top.
        yield from (folder for folder in (inner, *inner.parents) if folder == top or top in folder.parents)


def _numbers(file: Path) -> list[int]:
    """The numbers in a file such as ``200000 100000``; empty without such a file or without a limit."""
    try:
        words = file.read_text().split()
    except OSError:
        return []
    return [int(word) for word in words] if all(word.lstrip("-").isdigit() for word in words) else []
