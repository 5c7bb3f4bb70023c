"""Checks that several functions and modules share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from normfused import _extension, _torch_private

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def needs_torchs_operators(compiling: bool) -> bool:
    """Whether the graph that is being recorded must consist of torch's own operators.

    That is so under ``torch.jit.trace``, and in compilers if the extension did not load.
    """
    return _extension.C is None if compiling else _torch_private.is_jit_tracing()


def check_device(input: Tensor) -> None:
    """Raise ``RuntimeError`` for a CUDA tensor if the extension has no CUDA kernels."""
    if input.is_cuda and _extension.C is not None and not _extension.C.has_cuda():
        raise RuntimeError(_extension.no_cuda_message())


def check_process_group(caller: str, process_group: Any) -> None:
    """Raise ``RuntimeError`` if this process is not in the process group. ``None`` is the group of all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(f"{caller} needs a process group: call torch.distributed.init_process_group first")
    if distributed.get_rank(process_group) < 0:
        raise RuntimeError(f"{caller}: this process is not in the process group")


def check_can_be_overwritten(caller: str, input: Tensor) -> None:
    """Raise ``RuntimeError`` if writing over ``input`` would give wrong results or gradients."""
    if torch.compiler.is_compiling() or _torch_private.is_in_functorch():
        return  # there the result is written by copy_, which has torch's own checks
    if _torch_private.overlaps_itself(input):
        raise RuntimeError(
            f"{caller} cannot write over input, whose elements share memory: shape {tuple(input.shape)}, "
            f"strides {input.stride()}; clone it first"
        )
    if input.is_neg():
        raise RuntimeError(
            f"{caller} cannot write over input, a view that negates its memory; pass a copy: input.resolve_neg()"
        )
    base = _torch_private.view_base(input)
    if torch.is_grad_enabled() and base is not None and base.is_leaf and base.requires_grad:
        kind = "a leaf" if base is input else "a view of a leaf"
        raise RuntimeError(f"{caller} cannot write over input, {kind} that requires grad")
