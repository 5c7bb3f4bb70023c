"""What the CUDA kernels of a layer launch and move, computed from their plans on any machine."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfused._extension import C
from normfused.batch_norm_base import _BatchNorm
from normfused.layer_norm_layers import _ChannelNorm
from normfused.layout import as_dense
from normfused.sample_norm_layers import _GroupNorm, _InstanceNorm

_BATCH_NORMS = (_BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (_InstanceNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_GROUP_NORMS = (_GroupNorm, nn.GroupNorm)
_LAYER_NORMS = (nn.LayerNorm, nn.RMSNorm)
_TWO_PASSES = "reduction, then application"


class CudaDevice(NamedTuple):
    """The properties of a GPU that plans depend on."""

    name: str
    multiprocessors: int
    l2_bytes: int
    shared_bytes: int  # the maximum shared memory of a block
    max_cluster: int  # the maximum number of blocks that run together; 1: no clusters


_DEVICES = {
    device.name: device
    for device in (
        CudaDevice("a100", 108, 40 << 20, 163 << 10, 1),
        CudaDevice("h100", 132, 50 << 20, 227 << 10, 8),
        CudaDevice("h200", 132, 50 << 20, 227 << 10, 8),
        CudaDevice("l4", 58, 48 << 20, 99 << 10, 1),
        CudaDevice("t4", 40, 4 << 20, 64 << 10, 1),
    )
}


class CudaPass(NamedTuple):
    """One pass of a layer. Bytes are those of tensors and of partial sums, without parameters and statistics."""

    name: str  # "forward" or "backward"
    path: str  # how often the tensor is read, and by which launches
    reason: str
    launches: int
    read_bytes: int
    written_bytes: int
    floor_bytes: int  # of all tensors, each moved once


class CudaPlan(NamedTuple):
    """The passes of a layer for a tensor, from :func:`explain`. ``print`` shows them as text.

    Example:
        >>> import torch, normfused
        >>> plan = normfused.explain(normfused.LayerNorm(768), torch.empty(4096, 768, device="meta"), device="l4")
        >>> [(step.name, step.launches, step.read_bytes / step.written_bytes) for step in plan.passes[:1]]
        [('forward', 1, 1.0)]
    """

    layer: str
    tensor: str
    device: CudaDevice
    passes: tuple[CudaPass, ...]

    def __str__(self) -> str:
        device = (
            f"{self.device.name}: {self.device.multiprocessors} multiprocessors, {self.device.l2_bytes >> 20} MiB of L2"
        )
        lines = [self.layer, self.tensor, device]
        for step in self.passes:
            moved = step.read_bytes + step.written_bytes
            lines += [
                f"{step.name}: {step.path} ({step.reason})",
                f"    {_count(step.launches, 'launch')}, {_size(moved)} moved, "
                f"{moved / step.floor_bytes:.2f} times the {_size(step.floor_bytes)} of the tensors",
            ]
        return "\n".join(lines)


def explain(layer: nn.Module, x: Tensor, *, device: str | torch.device | None = None) -> CudaPlan:
    """Tell which CUDA kernels a layer would launch for a tensor, and how many bytes they would move.

    Nothing is computed, so a tensor on the "meta" device does as well, and no GPU is needed. The plan is that of the
    layer in its present mode, training or evaluation, without a residual, with gradients of all parameters. Of torch's
    layers, it is the plan of the normfused layer that :func:`convert` would put in their place.

    Args:
        layer: A batch, group, instance, layer or RMS norm.
        x: The input, of shape, dtype and memory layout that the layer takes. Its values do not matter.
        device: "a100", "h100", "h200", "l4" or "t4", or a CUDA device of this machine such as "cuda:0".
            Default: the device of ``x``.

    Returns:
        The passes "forward" and "backward", each with its ``path`` and the ``reason`` for it, ``launches``,
        ``read_bytes``, ``written_bytes`` and ``floor_bytes``, the size of the tensors that the pass must read or write.

    Raises:
        RuntimeError: Without the compiled extension.
        TypeError: If the layer has no plan, such as a synchronized batch norm or local response norm, or x is not a
            floating tensor.
        ValueError: If x does not fit the layer, is empty, or is not dense in memory in an order that the layer reads,
            or if the device is unknown. And what a call of the layer raises.

    Example:
        >>> import torch, normfused
        >>> x = torch.empty(2, 1280, 16, 16, device="meta")
        >>> print(normfused.explain(normfused.GroupNorm(32, 1280), x, device="h100"))  # doctest: +ELLIPSIS
        GroupNorm(32, 1280, ...)
        (2, 1280, 16, 16), torch.float32, contiguous
        h100: 132 multiprocessors, 50 MiB of L2
        forward: held in registers (a block holds the 10240 values of a statistic)
            1 launch, 5.2 MB moved, 1.00 times the 5.2 MB of the tensors
        backward: held in shared memory (a block holds the 10240 values of a statistic of two tensors)
            3 launches, 7.9 MB moved, 1.01 times the 7.9 MB of the tensors
    """
    if C is None:
        raise RuntimeError("explain needs the compiled extension; normfused.info() tells why it is missing")
    _check(layer, x)
    on = cuda_device(x.device if device is None else device)
    if isinstance(layer, _INSTANCE_NORMS) and x.dim() == layer._get_no_batch_dim():
        x = x[None]
    reads_rows = isinstance(layer, _LAYER_NORMS) and not isinstance(layer, _ChannelNorm)
    if as_dense(x) is not x or (reads_rows and not x.is_contiguous()):
        raise ValueError(f"x must be dense in memory, in an order that the layer reads, got strides {x.stride()}")
    layout = "channels last" if _is_channels_last(x) else "contiguous"
    return CudaPlan(str(layer), f"{tuple(x.shape)}, {x.dtype}, {layout}", on, _passes(layer, x, on))


def _check(layer: nn.Module, x: Tensor) -> None:
    """Raise what a call of the layer raises, and what has no plan."""
    if hasattr(layer, "process_group"):
        raise TypeError(f"layer {type(layer).__name__} has no plan: its launches depend on the other processes")
    if not isinstance(layer, (*_BATCH_NORMS, *_INSTANCE_NORMS, *_GROUP_NORMS, *_LAYER_NORMS)):
        raise TypeError(f"layer {type(layer).__name__} has no plan; batch, group, instance, layer and RMS norms have")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.numel() == 0:
        raise ValueError(f"x has no values: shape {tuple(x.shape)}")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy.deepcopy(layer).to("meta")(x.to("meta"))
    features = getattr(layer, "num_features", getattr(layer, "num_channels", None))
    dim = x.dim() - layer._get_no_batch_dim() if isinstance(layer, _INSTANCE_NORMS) else 1
    if features is not None and not isinstance(layer, _LAYER_NORMS) and x.shape[dim] != features:
        raise ValueError(f"x must have {features} channels, got shape {tuple(x.shape)}")


def cuda_device(device: str | torch.device) -> CudaDevice:
    """The properties of a GPU by its name in :func:`explain`, or of one of this machine."""
    if isinstance(device, str) and device.lower() in _DEVICES:
        return _DEVICES[device.lower()]
    names = ", ".join(f'"{name}"' for name in _DEVICES)
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be one of {names} or a CUDA device, got {device!r}") from None
    if found.type != "cuda":
        raise ValueError(f"device must be one of {names} or a CUDA device, got {str(found)!r}")
    if not torch.cuda.is_available():
        raise ValueError(f"device {str(found)!r} is not available; without it, pass one of {names}")
    properties = torch.cuda.get_device_properties(found)
    return CudaDevice(
        properties.name,
        properties.multi_processor_count,
        properties.L2_cache_size,
        getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
        8 if properties.major >= 9 else 1,
    )


def _passes(layer: nn.Module, x: Tensor, device: CudaDevice) -> tuple[CudaPass, CudaPass]:
    """The passes of a layer, by its kind."""
    if isinstance(layer, _LAYER_NORMS):
        return _layer_norm(layer, x, device)
    if isinstance(layer, _GROUP_NORMS):
        return _sample_norm(x, layer.num_groups, device)
    if not isinstance(layer, _INSTANCE_NORMS):
        return _batch_norm(layer, x, device)
    if layer.training or layer.running_mean is None:
        return _sample_norm(x, layer.num_features, device)
    return _batch_norm(layer, x, device)


def _pass(name: str, path: str, reason: str, plan: dict[str, Any], x: Tensor, tensors: int) -> CudaPass:
    floor = tensors * x.numel() * x.element_size()
    return CudaPass(name, path, reason, plan["launches"], plan["read"], plan["written"], floor)


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous()


def _batch_norm(layer: Any, x: Tensor, device: CudaDevice) -> tuple[CudaPass, CudaPass]:
    samples, channels, inner = x.shape[0], x.shape[1], x[0, 0].numel()
    view = (samples * inner, channels, 1) if _is_channels_last(x) else (samples, channels, inner)

    fused = getattr(layer, "activation", None) is not None

    def plan(operation: str) -> dict[str, Any]:
        return C.cuda_traffic(getattr(C.Operation, operation), view, x.element_size(), fused, *device[1:])  # type: ignore

    def steps(name: str, operation: str, tensors: int) -> CudaPass:
        chosen = plan(operation)
        if chosen["single"]:
            size = _size(chosen["staged_bytes"])
            cluster = f"the {chosen['splits']} blocks of a cluster copy their channels once, {size} each"
            reason = f"a block copies its channels once, {size}" if chosen["splits"] == 1 else cluster
            return _pass(name, "held in shared memory", reason, chosen, x, tensors)
        if chosen["pipelined"]:
            ahead = _count(chosen["window"] - 1, "range")
            reason = f"a range of channels is applied when the next {ahead} of {chosen['tiles']} are reduced"
            return _pass(name, "read again from the L2 cache", reason, chosen, x, tensors)
        if chosen["persistent"]:
            rest = (tensors - 1) * x.numel() * x.element_size() - chosen["kept"]
            blocks = f"{_count(chosen['blocks'], 'block')} keep"
            if rest == 0:
                return _pass(name, "held in shared memory", f"{blocks} the whole tensor", chosen, x, tensors)
            reason = f"{blocks} {_size(chosen['kept'])} and read the other {_size(rest)} again"
            return _pass(name, "held in shared memory in part", reason, chosen, x, tensors)
        blocks, ranges = _count(chosen["splits"], "block"), _count(chosen["tiles"], "range")
        divided = f"{blocks} for each of {ranges} of channels"
        return _pass(name, _TWO_PASSES, divided, chosen, x, tensors)

    if layer.training or layer.running_mean is None:
        return steps("forward", "TRAINING", 2), steps("backward", "BACKWARD", 3)
    constants = "the statistics are constants"
    forward = _pass("forward", "application", constants, plan("INFERENCE"), x, 2)
    if layer.weight is not None or layer.bias is not None:
        return forward, steps("backward", "INFERENCE_BACKWARD", 3)
    # Without parameters the gradient is a multiple, of which the input is a factor only through an activation.
    reads_input = int(fused)
    backward = plan("INFERENCE")
    backward["read"] += reads_input * x.numel() * x.element_size()
    return forward, _pass("backward", "application", constants, backward, x, 2 + reads_input)


def _held(is_staged: bool, blocks: int, values: str) -> tuple[str, str]:
    """Path and reason of a launch that reads its values once."""
    who = "a block holds" if blocks == 1 else f"{blocks} blocks of a cluster hold"
    return "held in shared memory" if is_staged else "held in registers", f"{who} {values}"


def _sample_norm(x: Tensor, groups: int, device: CudaDevice) -> tuple[CudaPass, CudaPass]:
    """Group norm, and instance norm with one channel per group."""
    channels_last, itemsize = _is_channels_last(x), x.element_size()
    view = (x.shape[0], groups, x.shape[1], x[0, 0].numel())
    count = x[0].numel() // groups
    forward, backward = (C.cuda_group_norm_plan(view, channels_last, itemsize, b, *device[1:]) for b in (False, True))  # type: ignore
    values = f"the {count} values of a statistic"
    if forward["launches"] == 1:
        blocks = forward["splits" if channels_last else "chunks"]
        ahead = _held(channels_last or forward["is_staged"], blocks, values)
    elif channels_last:
        ahead = _TWO_PASSES, f"{values} do not fit shared memory, or channels do not fill vectors"
    else:
        fits = C.cuda_layer_norm_plan((1, count, 1), 1, itemsize, False, *device[1:])["launches"] == 1  # type: ignore
        large = f"{values} do not fit shared memory"
        ahead = _TWO_PASSES, "a vector has values of several channels" if fits else large
    if backward["launches"] == 3:
        back = _held(True, backward["splits"], f"{values} of two tensors")
    elif channels_last:
        back = _TWO_PASSES, f"{values} of two tensors do not fit shared memory, or channels do not fill vectors"
    else:
        back = _TWO_PASSES, f"{values} of two tensors do not fit shared memory, or vectors have several channels"
    return _pass("forward", *ahead, forward, x, 2), _pass("backward", *back, backward, x, 3)


def _layer_norm(layer: Any, x: Tensor, device: CudaDevice) -> tuple[CudaPass, CudaPass]:
    """Layer norm and RMS norm."""
    over_channels = isinstance(layer, _ChannelNorm)
    count = x.shape[1] if over_channels else math.prod(layer.normalized_shape)
    is_row = not over_channels or _is_channels_last(x) or x.numel() == x.shape[0] * count
    view = (x.numel() // count, count, 1) if is_row else (x.shape[0], count, x[0, 0].numel())

    def step(name: str, backward: bool, tensors: int) -> CudaPass:
        plan = C.cuda_layer_norm_plan(view, 1, x.element_size(), backward, *device[1:])  # type: ignore
        if not is_row:
            return _pass(
                name, "read again from the caches", "a block has all values of its positions", plan, x, tensors
            )
        if plan["chunks"] == 1 or plan["staged_bytes"]:
            held = _held(plan["staged_bytes"] > 0, plan["chunks"], f"the {count} values of a row")
            return _pass(name, *held, plan, x, tensors)
        reason = f"the {count} values of a row are divided among {plan['chunks']} blocks"
        return _pass(name, _TWO_PASSES, reason, plan, x, tensors)

    return step("forward", False, 2), step("backward", True, 3)


def _count(n: int, unit: str) -> str:
    plural = "es" if unit.endswith("ch") else "s"
    return f"{n} {unit}{'' if n == 1 else plural}"


def _size(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"
