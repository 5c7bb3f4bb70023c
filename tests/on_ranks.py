"""Helpers for functions that run on ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode


def share(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """This rank's part of `values`; rank r has `sizes[r]` samples."""
    return values.split(list(sizes))[distributed.get_rank()].clone()


def gather_all(values: Tensor) -> list[Tensor]:
    """The tensors of all ranks, which have equal shapes."""
    gathered = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, values.contiguous())
    return gathered


def total(values: Tensor) -> Tensor:
    return torch.stack(gather_all(values)).sum(0)


def assert_equal_on_all_ranks(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            for other in gather_all(tensor):
                assert torch.equal(other.nan_to_num(7.5), tensor.nan_to_num(7.5))


def assert_close(got: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert got.dtype == expected.dtype or expected.dtype == torch.float64
    assert got.shape == expected.shape
    if got.numel():
        error = (got.double() - expected.double()).abs().max() / max(1.0, expected.double().abs().max())
        assert error <= tolerance, f"{name} off by {error:.2e}"


def error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Traffic(TorchDispatchMode):
    """The collectives that are called, and the bytes that this rank sends in each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "c10d" in name and "wait_tensor" not in name:
            nbytes = args[0].nbytes if isinstance(args[0], Tensor) else sum(t.nbytes for t in args[0])
            self.calls.append((name.split("::")[1].split(".")[0], nbytes))
        return func(*args, **(kwargs or {}))


GATHER, REDUCE = "all_gather_into_tensor", "all_reduce"
