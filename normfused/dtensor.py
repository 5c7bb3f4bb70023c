"""Functions of DTensors, by what each rank computes of its shards.

Channels are independent: where they are sharded, every rank computes its own. Evaluation normalizes each position for
itself. What else depends on other shards is computed of replicated tensors, as torch does for its own batch norm.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normfused import reference
from normfused.arguments import BatchNormCall

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

Placements = tuple["Placement", ...]


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor; without importing what defines them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def refuse(name: str, argument: str, value: object) -> None:
    """Raise ``TypeError`` where ``value`` is a DTensor."""
    if is_dtensor(value):
        raise TypeError(f"{name}: {argument} must be a plain tensor, got a DTensor; call it on {argument}.to_local()")


def batch_norm(function: Callable[[BatchNormCall], Tensor], call: BatchNormCall) -> Tensor:
    """``function``, which is :func:`normfused.functional.run_batch_norm`, of a DTensor.

    Running statistics are written, so that their placements stay and decide: sharded, so are the channels of
    everything; replicated, so is the input in training. Without them the input's placements decide.
    """
    name = call.name
    input: Any = call.input
    if call.mask is not None or call.inplace:
        raise NotImplementedError(f"{name}: input is a DTensor, with which mask, lengths and inplace are not supported")
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
    # Each rank's gradients of the parameters are of its own positions.
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
    """``function`` of a DTensor, with all channels on every rank."""
    placements = _without_channels(input)
    return _distributed_as(function(_local(input, placements), *arguments), input, placements)


def channel_statistics(function: Callable[..., Any], input: Any) -> Any:
    """``function``, which gives a named tuple of a count and vectors, of a DTensor; the vectors are DTensors."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    of_values = tuple(p if p.is_shard(1) and _is_even(input, 1) else Replicate() for p in input.placements)
    of_vectors = [Shard(0) if p.is_shard() else Replicate() for p in of_values]
    count, *vectors = results = function(_local(input, of_values))
    return type(results)(count, *(DTensor.from_local(v, input.device_mesh, of_vectors) for v in vectors))


def _placements(name: str, input: Any, running_mean: Any, training: bool) -> tuple[Placements, Placements]:
    """What input and vectors are computed as."""
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
    """Whether all shards of a dimension have the same size, so that no rank has none."""
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
    """The part of this rank, of what is only read."""
    if tensor is None:
        return None
    return tensor.redistribute(placements=placements).to_local(grad_placements=of_gradients or placements)


def _own(buffer: Any) -> Any:
    """The part of this rank, of what is written."""
    return buffer.to_local() if is_dtensor(buffer) else buffer


def _distributed_as(output: Tensor, input: Any, placements: Placements) -> Tensor:
    from torch.distributed.tensor import DTensor

    whole = torch.empty_strided(input.shape, input.stride(), device="meta")
    strides = torch.empty_like(reference.as_dense(whole)).stride()
    return DTensor.from_local(output, input.device_mesh, placements, run_check=False, shape=input.shape, stride=strides)
