"""What functions of several kinds look at before they begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd import forward_ad

from normfused import _extension

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is active: operators in place have no derivative there."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def needs_torchs_operators(compiling: bool) -> bool:
    """Whether a recording must hold torch's operators: by ``torch.jit``, and by compilers where ours did not load."""
    return _extension.C is None if compiling else torch._C._is_tracing()


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation follows this tensor."""
    if forward_ad._current_level < 0:
        return False
    tangent: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return tangent is not None


def is_functionalized() -> bool:
    """Whether :func:`torch.func.functionalize` is active."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(interpreter.key() == torch._C._functorch.TransformType.Functionalize for interpreter in stack)


def check_device(input: Tensor) -> None:
    """Raise ``RuntimeError`` for a CUDA tensor where the extension has no CUDA kernels."""
    if input.is_cuda and _extension.C is not None and not _extension.C.has_cuda():
        raise RuntimeError(_extension.no_cuda_message())


def check_group(who: str, group: Any) -> None:
    """Raise ``RuntimeError`` where this process is not in the process group; ``None``: that of all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(f"{who} needs a process group: call torch.distributed.init_process_group first")
    if distributed.get_rank(group) < 0:
        raise RuntimeError(f"{who}: this process is not in the group")


def check_can_be_overwritten(who: str, input: Tensor) -> None:
    """Raise ``RuntimeError`` where writing over ``input`` would be wrong."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return  # these write by copy_, which has torch's own checks
    if torch._debug_has_internal_overlap(input) == 1:
        raise RuntimeError(
            f"{who} cannot write over input, whose elements share memory: shape {tuple(input.shape)}, "
            f"strides {input.stride()}; clone it first"
        )
    base = input._base if input._is_view() else input
    if torch.is_grad_enabled() and base is not None and base.is_leaf and base.requires_grad:
        kind = "a leaf" if base is input else "a view of a leaf"
        raise RuntimeError(f"{who} cannot write over input, {kind} that requires grad")
