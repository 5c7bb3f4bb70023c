"""What functions of several kinds look at before they begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd import forward_ad

from normfused import _extension

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work.

    Autograd Functions written in C++ refuse the one, and would lose the other's tangents without a word.
    """
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def needs_torchs_operators(compiling: bool) -> bool:
    """Whether a recording must hold torch's operators: by ``torch.jit``, and by compilers where ours did not load."""
    return _extension.C is None if compiling else torch._C._is_tracing()


def check_device(input: Tensor) -> None:
    """Raise ``RuntimeError`` for a CUDA tensor where the extension has no CUDA kernels."""
    if input.is_cuda and _extension.C is not None and not _extension.C.has_cuda():
        raise RuntimeError(_extension.no_cuda_message())


def check_residual(input: Tensor, residual: Tensor) -> None:
    """Raise where ``residual`` cannot be added to ``input``."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"batch_norm: residual must be a tensor or None, got {type(residual).__name__}")
    if residual.shape != input.shape:
        raise ValueError(
            f"batch_norm: residual must have input's shape {tuple(input.shape)}, got {tuple(residual.shape)}"
        )
    if residual.dtype != input.dtype:
        raise TypeError(f"batch_norm: residual must be {input.dtype} as input is, got {residual.dtype}")
    if residual.device != input.device:
        raise ValueError(f"batch_norm: residual is on {residual.device}, but input is on {input.device}")


def check_group(who: str, group: Any) -> None:
    """Raise ``RuntimeError`` where this process is not in the process group; ``None``: that of all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(f"{who} needs a process group: call torch.distributed.init_process_group first")
    if distributed.get_rank(group) < 0:
        raise RuntimeError(f"{who}: this process is not in the group")


def check_can_be_overwritten(who: str, input: Tensor) -> None:
    """Raise ``RuntimeError`` where writing over ``input`` would be wrong."""
    if torch.compiler.is_compiling():
        return
    if torch._debug_has_internal_overlap(input) == 1:
        raise RuntimeError(
            f"{who} cannot write over input, whose elements share memory: shape {tuple(input.shape)}, "
            f"strides {input.stride()}; clone it first"
        )
    base = input._base if input._is_view() else input
    if torch.is_grad_enabled() and base is not None and base.is_leaf and base.requires_grad:
        kind = "a leaf" if base is input else "a view of a leaf"
        raise RuntimeError(f"{who} cannot write over input, {kind} that requires grad")
