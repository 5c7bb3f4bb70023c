"""The memory pool for outputs on the CPU."""

from __future__ import annotations

from normfused._extension import C

_KEYS = ("allocated_bytes", "peak_allocated_bytes", "cached_bytes", "max_cached_bytes", "allocations", "reuses")


def memory_stats() -> dict[str, int]:
    """Describe the memory pool that outputs of 1 MiB and more on the CPU use.

    A freed output's memory is reused by the next output that fits. Until then the operating system may take its pages
    whenever a program needs memory; it then looks free to it, but counts as resident memory (RSS) of this process. The
    pool keeps no more than the outputs of the last 30 to 60 seconds used at the same time, and no more than half of the
    memory of the machine or of its control group.

    Returns:
        - ``allocated_bytes``: memory of outputs that are alive, in whole pages of 2 MiB
        - ``peak_allocated_bytes``: the maximum of ``allocated_bytes`` so far
        - ``cached_bytes``: free memory that is kept for reuse
        - ``max_cached_bytes``: the bound on ``cached_bytes`` at this moment
        - ``allocations``: outputs that the pool has served
        - ``reuses``: those of them that reused free memory

        All are zero without a pool: on systems other than Linux, with ``NORMFUSED_POOL=0``, and without the extension.

    Raises:
        ValueError: If ``NORMFUSED_POOL`` is not 0 or 1, or ``NORMFUSED_POOL_LIMIT`` is not a number of bytes.

    Example:
        >>> import torch, normfused
        >>> x = torch.randn(8, 64, 56, 56)  # 6.1 MiB
        >>> y = normfused.BatchNorm2d(64)(x)
        >>> memory_stats()["allocated_bytes"] % 2**21
        0
    """
    return C.memory_stats() if C is not None else dict.fromkeys(_KEYS, 0)


def empty_cache() -> None:
    """Return the free memory of the pool to the operating system, as :func:`torch.cuda.empty_cache` does on CUDA.

    Outputs that are alive keep their memory. The next outputs are slower, because their pages are new.

    Example:
        >>> empty_cache()
        >>> memory_stats()["cached_bytes"]
        0
    """
    if C is not None:
        C.empty_cache()
