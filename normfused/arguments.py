"""What the arguments of the functions must be. Each check raises an exception that names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normfused._torch_private import has_tangent
from normfused.activations import ACTIVATIONS
from normfused.checks import DTYPES, check_can_be_overwritten, check_device
from normfused.residuals import check_residual


def check_local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> None:
    """Raise what is wrong with the arguments of :func:`normfused.functional.local_response_norm`, if anything."""
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


def check_shape(name: str, ranks: tuple[int, ...] | None, input: Tensor, training: bool, buffers: bool) -> None:
    """Raise where ``input`` has a rank that is not among ``ranks``, or too few values to train with."""
    try:
        rank = input.dim()
    except AttributeError:
        raise TypeError(f"{name}: input must be a tensor, got {type(input).__name__}") from None
    if ranks is not None and rank not in ranks:
        allowed = " or ".join(f"{r}D" for r in ranks)
        raise ValueError(f"{name}: expected a {allowed} input, got {rank}D input of shape {tuple(input.shape)}")
    if rank < 2:
        raise ValueError(f"{name}: input needs at least 2 dimensions (N, C, ...), got shape {tuple(input.shape)}")
    if training and input.numel() == input.size(1) != 0:
        got = f"got input of shape {tuple(input.shape)}"
        drop = "drop the last incomplete batch (DataLoader(drop_last=True))"
        if not buffers:  # eval mode is no way out
            raise ValueError(
                f"{name}: expected more than 1 value per channel without running statistics, {got}; "
                f"use a bigger batch, keep running statistics, or {drop}"
            )
        raise ValueError(
            f"{name}: expected more than 1 value per channel when training, {got}; "
            f"use a bigger batch, put the module in eval mode, or {drop}"
        )


def check_statistics_input(name: str, input: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise where ``input`` has no channels, or a dtype that is not among ``dtypes``."""
    if input.dim() < 2:
        raise ValueError(f"{name}: input needs at least 2 dimensions (N, C, ...), got shape {tuple(input.shape)}")
    if input.dtype not in dtypes:
        kinds = "a floating or integer tensor" if dtypes != DTYPES else "float32, float64, float16 or bfloat16"
        raise TypeError(f"{name}: input must be {kinds}, got {input.dtype}")
    check_device(input)


def check_activation(name: str, activation: str, parameter: float) -> None:
    """Raise ``ValueError`` where there is no such activation, or not with that parameter."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: unknown activation {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    if not isinstance(parameter, (int, float)) or not -math.inf < parameter < math.inf:
        raise ValueError(f"{name}: activation_param must be a finite number, got {parameter!r}")


def check_invertible(name: str, activation: str | None, parameter: float) -> None:
    """Raise ``ValueError`` where an activation's input cannot be told from its output."""
    if activation in (None, "identity") or (activation == "leaky_relu" and parameter > 0):
        return
    got = f"{activation!r} with {parameter}" if activation == "leaky_relu" else repr(activation)
    raise ValueError(
        f"{name}: inplace=True needs an activation that can be undone, 'identity' or 'leaky_relu' with a positive "
        f"activation_param, got {got}"
    )


def check_inplace(
    name: str,
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
    activation_param: float,
) -> None:
    """Raise where the output cannot be written over ``input``."""
    check_activation(name, activation, activation_param)
    check_invertible(name, activation, activation_param)
    for other, value in (("residual", residual), ("mask", mask)):
        if value is not None:
            raise ValueError(f"{name}: inplace=True takes no {other}")
    check_can_be_overwritten(f"{name}: inplace=True", input)
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and input.requires_grad):
        return
    # The attribute is one of the class, so that nothing is unpacked to see it.
    if hasattr(input.grad_fn, "_raw_saved_result"):
        assert input.grad_fn is not None
        raise RuntimeError(
            f"{name}: inplace=True cannot write over input, which {input.grad_fn.name()} made and keeps for backward; "
            "use inplace=False here"
        )


def check_arguments(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_param: float,
    running_var_correction: int,
    nonfinite_batches: Tensor | None,
) -> None:
    """Raise what is wrong with the arguments of :func:`normfused.functional.batch_norm`, if anything."""
    if input.dtype not in DTYPES:
        raise TypeError(f"batch_norm: input must be float32, float64, float16 or bfloat16, got {input.dtype}")
    if input.layout != torch.strided:
        raise TypeError(f"batch_norm: input must be a strided tensor, got layout {input.layout}")
    check_device(input)
    if (running_mean is None) != (running_var is None):
        given = "running_var" if running_mean is None else "running_mean"
        raise ValueError(f"batch_norm: running_mean and running_var must be given together, got only {given}")
    if running_mean is None and not training:
        raise ValueError("batch_norm: running_mean and running_var are needed when training=False")
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    dtypes = {input.dtype} if input.dtype in (torch.float32, torch.float64) else {torch.float32, input.dtype}
    for name, vector in vectors.items():
        if vector is None:
            continue
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
    if running_mean is not None and running_mean is running_var:
        raise ValueError("batch_norm: running_mean and running_var are the same tensor")
    if num_batches_tracked is not None and num_batches_tracked.device != input.device:
        raise ValueError(
            f"batch_norm: num_batches_tracked is on {num_batches_tracked.device}, but input is on {input.device}"
        )
    if num_batches_tracked is not None and (num_batches_tracked.dtype != torch.int64 or num_batches_tracked.dim() != 0):
        raise ValueError(
            f"batch_norm: num_batches_tracked must be a 0-d int64 tensor, got {num_batches_tracked.dtype} "
            f"of shape {tuple(num_batches_tracked.shape)}"
        )
    if training and momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError("batch_norm: momentum=None (cumulative average) needs num_batches_tracked")
    if training and momentum is not None and not -math.inf < momentum < math.inf:
        raise ValueError(f"batch_norm: momentum must be a finite number or None, got {momentum}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"batch_norm: eps must be a non-negative finite number, got {eps}")
    if residual is not None:
        check_residual(input, residual)
    check_activation("batch_norm", activation, activation_param)
    if running_var_correction not in (0, 1):
        raise ValueError(f"batch_norm: running_var_correction must be 0 or 1, got {running_var_correction!r}")
    if nonfinite_batches is not None and (
        nonfinite_batches.dtype != torch.int64
        or nonfinite_batches.shape != (input.size(1),)
        or nonfinite_batches.device != input.device
    ):
        raise ValueError(
            f"batch_norm: nonfinite_batches must be an int64 tensor of shape ({input.size(1)},) on {input.device}, "
            f"got {nonfinite_batches.dtype} of shape {tuple(nonfinite_batches.shape)} on {nonfinite_batches.device}"
        )
