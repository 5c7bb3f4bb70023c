"""The functions for DTensors: what each rank computes from its shards.

Channels are independent: if they are sharded, each rank computes its own. In evaluation positions are independent too.
Everything else depends on other shards, and is computed from replicated tensors, as in torch's own batch norm.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normfused.arguments import BatchNormCall
from normfused.layout import as_dense

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

Placements = tuple["Placement", ...]


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor. Does not import torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def refuse(name: str, argument: str, value: object) -> None:
    """Raise ``TypeError`` if ``value`` is a DTensor."""
    if is_dtensor(value):
        raise TypeError(f"{name}: {argument} must be a plain tensor, got a DTensor; call it on {argument}.to_local()")


def batch_norm(function: Callable[[BatchNormCall], Tensor], call: BatchNormCall) -> Tensor:
    """``function``, which is :func:`normfused.functional.run_batch_norm`, for a DTensor as input.

    Running statistics are updated in place, so their placements decide: if they are sharded, the channels of all
    tensors are; if they are replicated, the input is replicated in training. Without running statistics the placements
    of the input decide.
    """
    name = call.name
    input: Any = call.input
    if call.mask is not None or call.inplace:
        raise NotImplementedError(f"{name}: mask, lengths and inplace are not supported for a DTensor")
    if input.dim() < 2:
        raise ValueError(f"{name}: input needs at least 2 dimensions (N, C, ...), got shape {tuple(input.shape)}")
    names = ("running_mean", "running_var", "weight", "bias", "nonfinite_batches")
    vectors: dict[str, Any] = {argument: getattr(call, argument) for argument in names}
    for argument, value in (*vectors.items(), ("residual", call.residual)):
        _check_mesh(name, argument, value, input)
    of_values, of_vectors = _placements(name, input, call.running_mean, call.training)
    for argument in ("running_mean", "running_var", "nonfinite_batches"):
        buffer = vectors[argument]
        if buffer is not None and buffer.placements != of_vectors:
            raise ValueError(f"{name}: {argument} must have the placements {of_vectors}, got {buffer.placements}")
    # Each rank's gradients of the parameters cover its own positions only.
    of_gradients = tuple(
        _partial() if value.is_shard() and vector.is_replicate() else vector
        for value, vector in zip(of_values, of_vectors, strict=True)
    )
    local = call._replace(
        input=_local(input, of_values),
        running_mean=_own(call.running_mean),
        running_var=_own(call.running_var),
        weight=_local(call.weight, of_vectors, of_gradients),
        bias=_local(call.bias, of_vectors, of_gradients),
        num_batches_tracked=_own(call.num_batches_tracked),
        residual=_local(call.residual, of_values),
        nonfinite_batches=_own(call.nonfinite_batches),
    )
    return _distributed_as(function(local), input, of_values)


def local_response_norm(function: Callable[..., Tensor], input: Any, *arguments: Any) -> Tensor:
    """``function`` for a DTensor, with all channels on each rank."""
    placements = _without_channels(input)
    return _distributed_as(function(_local(input, placements), *arguments), input, placements)


def channel_statistics(function: Callable[..., Any], input: Any) -> Any:
    """``function``, which returns a named tuple of a count and vectors, for a DTensor. The vectors are DTensors."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    of_values = tuple(p if p.is_shard(1) and _is_even(input, 1) else Replicate() for p in input.placements)
    of_vectors = [Shard(0) if p.is_shard() else Replicate() for p in of_values]
    count, *vectors = results = function(_local(input, of_values))
    return type(results)(count, *(DTensor.from_local(v, input.device_mesh, of_vectors) for v in vectors))


def _placements(name: str, input: Any, running_mean: Any, training: bool) -> tuple[Placements, Placements]:
    """The placements with which input and per-channel vectors are computed."""
    from torch.distributed.tensor import Replicate, Shard

    of_values: list[Placement] = []
    of_vectors: list[Placement] = []
    for i, placement in enumerate(input.placements):
        by_channel = placement.is_shard(1) if running_mean is None else running_mean.placements[i].is_shard(0)
        if by_channel:
            of_values.append(Shard(1))
        else:
            stays = not training and type(placement) is Shard and not placement.is_shard(1)
            of_values.append(placement if stays else Replicate())
        of_vectors.append(Shard(0) if by_channel else Replicate())
    if any(p.is_shard() for p in of_vectors) and not _is_even(input, 1, of_values):
        raise ValueError(
            f"{name}: {input.size(1)} channels cannot be sharded evenly over the mesh {tuple(input.device_mesh.shape)}"
        )
    return tuple(of_values), tuple(of_vectors)


def _is_even(input: Any, dim: int, placements: Any = None) -> bool:
    """Whether all shards of a dimension have the same size, so that no shard is empty."""
    shards = 1
    for i, placement in enumerate(input.placements if placements is None else placements):
        shards *= input.device_mesh.size(i) if placement.is_shard(dim) else 1
    return int(input.size(dim)) % shards == 0


def _without_channels(input: Any) -> Placements:
    from torch.distributed.tensor import Replicate, Shard

    return tuple(p if type(p) is Shard and not p.is_shard(1) else Replicate() for p in input.placements)


def _partial() -> Placement:
    from torch.distributed.tensor import Partial

    return Partial()


def _check_mesh(name: str, argument: str, value: Any, input: Any) -> None:
    if value is None:
        return
    if not is_dtensor(value):
        raise TypeError(
            f"{name}: {argument} must be a DTensor as input is, got {type(value).__name__}; "
            "see torch.distributed.tensor.distribute_module"
        )
    if value.device_mesh != input.device_mesh:
        raise ValueError(f"{name}: {argument} is on another device mesh than input")


def _local(tensor: Any, placements: Placements, of_gradients: Placements | None = None) -> Any:
    """The local part of a tensor that is only read."""
    if tensor is None:
        return None
    return tensor.redistribute(placements=placements).to_local(grad_placements=of_gradients or placements)


def _own(buffer: Any) -> Any:
    """The local part of a buffer that is written."""
    return buffer.to_local() if is_dtensor(buffer) else buffer


def _distributed_as(output: Tensor, input: Any, placements: Placements) -> Tensor:
    from torch.distributed.tensor import DTensor

    whole = torch.empty_strided(input.shape, input.stride(), device="meta")
    strides = torch.empty_like(as_dense(whole)).stride()
    return DTensor.from_local(output, input.device_mesh, placements, run_check=False, shape=input.shape, stride=strides)
