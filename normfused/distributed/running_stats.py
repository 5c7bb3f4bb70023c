"""Equal running statistics on all ranks, for layers that are not synchronized."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn

from normfused._torch_private import NormBase
from normfused.checks import check_process_group
from normfused.distributed.layers import group_of
from normfused.distributed.sync_batch_norm import gather

__all__ = ["sync_running_stats"]


def sync_running_stats(model: nn.Module, mode: str = "broadcast", process_group: Any = None) -> None:
    """Make the running statistics of all batch norms in ``model`` equal on all ranks, with one collective.

    For models whose batch norms are not synchronized, before evaluation or a checkpoint. It covers the batch norms of
    torch.nn and of this package. ``num_batches_tracked`` becomes the maximum over the ranks (with ``"broadcast"``, the
    value of the first rank).

    Args:
        model: a model with the same layers on each rank. Its buffers are changed in place.
        mode: ``"broadcast"``: the statistics of the first rank of the group; ``"mean"``: the means over the ranks of
            running means and of running variances; ``"pooled"``: mean and variance of the data of all ranks, weighted
            equally: the mean of the variances plus the variance of the means.
        process_group: the ranks; default all.

    Raises:
        ValueError: an unknown mode.
        RuntimeError: ``torch.distributed`` is not initialized; this process is not in the group; the layers differ
            between ranks.

    Example:
        >>> import tempfile, torch, normfused
        >>> model = torch.nn.Sequential(normfused.BatchNorm2d(3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
        ...     normfused.sync_running_stats(model, "pooled")
        ...     torch.distributed.destroy_process_group()
    """
    modes = ("broadcast", "mean", "pooled")
    if mode not in modes:
        raise ValueError(f"sync_running_stats: mode must be one of {', '.join(modes)}, got {mode!r}")
    check_process_group("sync_running_stats", process_group)
    layers = [layer for layer in model.modules() if isinstance(layer, NormBase)]
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    buffers = [[getattr(layer, kind) for layer in layers if layer.running_mean is not None] for kind in kinds]
    if not buffers[0]:
        return
    device = buffers[0][0].device
    # One float64 vector for all buffers; it represents counters up to 2^53 exactly.
    flat = [buffer for of_kind in buffers for buffer in of_kind]
    own = torch.cat([buffer.detach().reshape(-1).to(device, torch.float64) for buffer in flat])
    channels = sum(buffer.numel() for buffer in buffers[0])
    if mode == "broadcast":
        distributed.broadcast(own, group=process_group, group_src=0)
    else:
        group = group_of(process_group, "sync_running_stats")
        ranks = own.unsqueeze(0) if group is None else gather(own, group, "sync_running_stats")
        means, variances, counters = torch.split(ranks, [channels, channels, len(buffers[2])], dim=1)
        variance = variances.mean(0)
        if mode == "pooled":
            variance = variance + means.var(0, correction=0)
        own = torch.cat((means.mean(0), variance, counters.amax(0)))
    with torch.no_grad():
        for buffer, values in zip(flat, torch.split(own, [buffer.numel() for buffer in flat]), strict=True):
            buffer.copy_(values.view_as(buffer))
