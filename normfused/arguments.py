"""The arguments of the public functions, and their checks. Each check raises an exception that names the argument."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfused._torch_private import has_tangent, saves_its_result
from normfused.activations import ACTIVATIONS
from normfused.checks import DTYPES, check_can_be_overwritten, check_device
from normfused.residuals import check_residual


class BatchNormCall(NamedTuple):
    """One call of batch norm: the arguments of :func:`normfused.functional.batch_norm`, and what only layers know."""

    name: str  # of the function or layer, for error messages
    input_dims: tuple[int, ...] | None  # numbers of dimensions that input may have; None: any
    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float | None
    eps: float
    num_batches_tracked: Tensor | None
    residual: Tensor | None
    activation: str
    activation_param: float
    mask: Tensor | None
    running_var_correction: int
    nonfinite_batches: Tensor | None
    inplace: bool
    # False: a call inside a backward pass is a recomputation by checkpointing, and updates no buffer.
    update_in_backward: bool


# The fields of a BatchNormCall in a plain tuple, for the fast path.
BatchNormFields = tuple[
    str,
    tuple[int, ...] | None,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    bool,
    float | None,
    float,
    Tensor | None,
    Tensor | None,
    str,
    float,
    Tensor | None,
    int,
    Tensor | None,
    bool,
    bool,
]


def check_local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` for invalid arguments of local response normalization."""
    name = "local_response_norm"
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a tensor, got {type(input).__name__}")
    if input.dim() < 3:
        raise ValueError(f"{name}: input needs at least 3 dimensions (N, C, ...), got shape {tuple(input.shape)}")
    if input.dtype not in DTYPES:
        raise TypeError(f"{name}: input must be float32, float64, float16 or bfloat16, got {input.dtype}")
    check_device(input)
    if not isinstance(size, int):
        raise TypeError(f"{name}: size must be an int, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name}: size must be at least 1, got {size}")
    for argument, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name}: {argument} must be a number, got {type(value).__name__}")


def check_shape(name: str, input_dims: tuple[int, ...] | None, input: Tensor, training: bool, buffers: bool) -> None:
    """Raise unless ``input`` has one of these numbers of dimensions, and enough values per channel for training.

    ``buffers`` is whether there are running statistics, so that eval mode is an alternative.
    """
    try:
        dims = input.dim()
    except AttributeError:
        raise TypeError(f"{name}: input must be a tensor, got {type(input).__name__}") from None
    if input_dims is not None and dims not in input_dims:
        allowed = " or ".join(f"{d}D" for d in input_dims)
        raise ValueError(f"{name}: expected a {allowed} input, got {dims}D input of shape {tuple(input.shape)}")
    if dims < 2:
        raise ValueError(f"{name}: input needs at least 2 dimensions (N, C, ...), got shape {tuple(input.shape)}")
    if training and input.numel() == input.size(1) != 0:
        got = f"got input of shape {tuple(input.shape)}"
        drop = "drop the last incomplete batch (DataLoader(drop_last=True))"
        if not buffers:
            raise ValueError(
                f"{name}: expected more than 1 value per channel without running statistics, {got}; "
                f"use a bigger batch, keep running statistics, or {drop}"
            )
        raise ValueError(
            f"{name}: expected more than 1 value per channel when training, {got}; "
            f"use a bigger batch, put the module in eval mode, or {drop}"
        )


def check_statistics_input(name: str, input: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless ``input`` has at least 2 dimensions and one of these dtypes."""
    if input.dim() < 2:
        raise ValueError(f"{name}: input needs at least 2 dimensions (N, C, ...), got shape {tuple(input.shape)}")
    if input.dtype not in dtypes:
        kinds = "a floating or integer tensor" if dtypes != DTYPES else "float32, float64, float16 or bfloat16"
        raise TypeError(f"{name}: input must be {kinds}, got {input.dtype}")
    check_device(input)


def check_input(name: str, input: Tensor, dims: int) -> None:
    """Raise unless ``input`` is a strided tensor of a supported dtype and device with at least ``dims`` dimensions."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a tensor, got {type(input).__name__}")
    if input.dim() < dims:
        expected = "(N, C, ...)" if dims == 2 else "(N, C, L, ...)"
        raise ValueError(f"{name}: input needs at least {dims} dimensions {expected}, got shape {tuple(input.shape)}")
    if input.dtype not in DTYPES:
        raise TypeError(f"{name}: input must be float32, float64, float16 or bfloat16, got {input.dtype}")
    if input.layout != torch.strided:
        raise TypeError(f"{name}: input must be a strided tensor, got layout {input.layout}")
    check_device(input)


def check_parameter(name: str, argument: str, tensor: Tensor | None, input: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless a tensor has this shape, and ``input``'s dtype, or float32 for a 16-bit input."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor or None, got {type(tensor).__name__}")
    if tensor.device != input.device:
        raise ValueError(f"{name}: {argument} is on {tensor.device}, but input is on {input.device}")
    dtypes = (input.dtype,) if input.dtype in (torch.float32, torch.float64) else (torch.float32, input.dtype)
    if tensor.dtype not in dtypes:
        allowed = " or ".join(map(str, dtypes))
        raise TypeError(f"{name}: {argument} must be {allowed} for {input.dtype} input, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(
            f"{name}: {argument} must have shape {shape} for input of shape {tuple(input.shape)}, "
            f"got {tuple(tensor.shape)}"
        )


def modulated_parameters(
    dtype: torch.dtype,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    scale_offset: float = 0.0,
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias with which ``norm(input) * weight + bias`` includes the others, for input of this dtype.

    With ``scale`` or ``shift`` they are those of each sample. The arithmetic is in float32 or wider.
    """
    if scale is None and shift is None and not scale_offset:
        return weight, bias
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias, scale, shift = (None if t is None else t.to(wide) for t in (weight, bias, scale, shift))
    if weight is not None and scale_offset:
        weight = weight + scale_offset
    if scale is not None:
        factor = 1 + scale
        weight = factor if weight is None else weight * factor
        bias = None if bias is None else bias * factor
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return weight, bias


def check_number(name: str, argument: str, value: float, least: float = -math.inf) -> None:
    """Raise ``ValueError`` unless the value is a finite number of at least ``least``."""
    if not isinstance(value, (int, float)) or not least <= value < math.inf or value == -math.inf:
        kind = "a finite number" if least == -math.inf else "a non-negative finite number"
        raise ValueError(f"{name}: {argument} must be {kind}, got {value!r}")


def check_activation(name: str, activation: str, parameter: float) -> None:
    """Raise ``ValueError`` for an unknown activation, or a parameter that is not a finite number."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: unknown activation {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    if not isinstance(parameter, (int, float)) or not -math.inf < parameter < math.inf:
        raise ValueError(f"{name}: activation_param must be a finite number, got {parameter!r}")


def check_invertible(name: str, activation: str | None, parameter: float) -> None:
    """Raise ``ValueError`` unless the activation is invertible: its output determines its input."""
    if activation in (None, "identity") or (activation == "leaky_relu" and parameter > 0):
        return
    got = f"{activation!r} with {parameter}" if activation == "leaky_relu" else repr(activation)
    raise ValueError(
        f"{name}: inplace=True needs an invertible activation, 'identity' or 'leaky_relu' with a positive "
        f"activation_param, got {got}"
    )


def check_inplace(call: BatchNormCall) -> None:
    """Raise unless the output can overwrite ``call.input``."""
    name, input = call.name, call.input
    check_activation(name, call.activation, call.activation_param)
    check_invertible(name, call.activation, call.activation_param)
    for argument, value in (("residual", call.residual), ("mask", call.mask)):
        if value is not None:
            raise ValueError(f"{name}: inplace=True does not support {argument}")
    check_can_be_overwritten(f"{name}: inplace=True", input)
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and input.requires_grad):
        return
    if saves_its_result(input):
        assert input.grad_fn is not None
        raise RuntimeError(
            f"{name}: inplace=True cannot write over input, which {input.grad_fn.name()} made and saves for backward; "
            "use inplace=False here"
        )


def check_arguments(call: BatchNormCall) -> None:
    """Raise ``TypeError``, ``ValueError`` or ``RuntimeError`` for invalid arguments of batch norm.

    The messages start with ``batch_norm``. Neither the shape of ``input`` nor ``mask`` is checked, see
    :func:`check_shape` and :func:`normfused.masks.check_mask`.
    """
    input = call.input
    if input.dtype not in DTYPES:
        raise TypeError(f"batch_norm: input must be float32, float64, float16 or bfloat16, got {input.dtype}")
    if input.layout != torch.strided:
        raise TypeError(f"batch_norm: input must be a strided tensor, got layout {input.layout}")
    check_device(input)
    if (call.running_mean is None) != (call.running_var is None):
        given = "running_var" if call.running_mean is None else "running_mean"
        raise ValueError(f"batch_norm: running_mean and running_var must be given together, got only {given}")
    if call.running_mean is None and not call.training:
        raise ValueError("batch_norm: running_mean and running_var are needed when training=False")
    for name in ("weight", "bias", "running_mean", "running_var"):
        _check_vector(name, getattr(call, name), input)
    if call.running_mean is not None and call.running_mean is call.running_var:
        raise ValueError("batch_norm: running_mean and running_var are the same tensor")
    _check_numbers(call)
    if call.residual is not None:
        check_residual(input, call.residual)
    check_activation("batch_norm", call.activation, call.activation_param)
    if call.running_var_correction not in (0, 1):
        raise ValueError(f"batch_norm: running_var_correction must be 0 or 1, got {call.running_var_correction!r}")
    counts = call.nonfinite_batches
    expected = (torch.int64, (input.size(1),), input.device)
    if counts is not None and (counts.dtype, counts.shape, counts.device) != expected:
        raise ValueError(
            f"batch_norm: nonfinite_batches must be an int64 tensor of shape ({input.size(1)},) on {input.device}, "
            f"got {counts.dtype} of shape {tuple(counts.shape)} on {counts.device}"
        )


def _check_vector(name: str, vector: Tensor | None, input: Tensor) -> None:
    """Check a parameter or running statistic: one value per channel, in input's dtype or float32 for 16-bit input."""
    if vector is None:
        return
    dtypes = {input.dtype} if input.dtype in (torch.float32, torch.float64) else {torch.float32, input.dtype}
    if not isinstance(vector, Tensor):
        raise TypeError(f"batch_norm: {name} must be a tensor or None, got {type(vector).__name__}")
    if vector.device != input.device:
        raise ValueError(f"batch_norm: {name} is on {vector.device}, but input is on {input.device}")
    if vector.dtype not in dtypes:
        allowed = " or ".join(sorted((str(d) for d in dtypes), key=lambda d: d != "torch.float32"))
        raise TypeError(f"batch_norm: {name} must be {allowed} for {input.dtype} input, got {vector.dtype}")
    if vector.dim() != 1:
        raise ValueError(f"batch_norm: {name} must have shape ({input.size(1)},), got {tuple(vector.shape)}")
    if vector.size(0) != input.size(1):
        raise ValueError(
            f"batch_norm: {name} has {vector.numel()} elements, but input of shape {tuple(input.shape)} "
            f"has {input.size(1)} channels (dim 1)"
        )
    if name.startswith("running") and vector.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"batch_norm: {name} requires grad, but running statistics are not differentiated")
    if name.startswith("running") and has_tangent(vector):
        raise ValueError(f"batch_norm: {name} has a tangent, but running statistics are not differentiated")


def _check_numbers(call: BatchNormCall) -> None:
    """Check the counter, momentum and eps."""
    counter, input = call.num_batches_tracked, call.input
    if counter is not None and counter.device != input.device:
        raise ValueError(f"batch_norm: num_batches_tracked is on {counter.device}, but input is on {input.device}")
    if counter is not None and (counter.dtype != torch.int64 or counter.dim() != 0):
        raise ValueError(
            f"batch_norm: num_batches_tracked must be a 0-d int64 tensor, got {counter.dtype} "
            f"of shape {tuple(counter.shape)}"
        )
    if call.training and call.momentum is None and call.running_mean is not None and counter is None:
        raise ValueError("batch_norm: momentum=None (cumulative average) needs num_batches_tracked")
    if call.training and call.momentum is not None and not -math.inf < call.momentum < math.inf:
        raise ValueError(f"batch_norm: momentum must be a finite number or None, got {call.momentum}")
    if not 0 <= call.eps < math.inf:
        raise ValueError(f"batch_norm: eps must be a non-negative finite number, got {call.eps}")


def is_autocast(input: Tensor) -> bool:
    """Whether autocast gives float32 for norms of ``input``: on CUDA, as for torch's norms other than batch norm."""
    return input.is_cuda and input.dtype != torch.float64 and torch.is_autocast_enabled("cuda")


def in_float32(call: Any) -> Any:
    """The call with what autocast does to the arguments of such a norm on CUDA: its 16-bit tensors become float32."""
    halves = (torch.float16, torch.bfloat16)
    wide = {
        name: value.float()
        for name, value in call._asdict().items()
        if isinstance(value, Tensor) and value.dtype in halves
    }
    return call._replace(**wide)
