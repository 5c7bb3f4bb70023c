"""Runs every operator of normfused on small tensors and compares the results with float64 on the CPU.

``python benchmarks/operators.py --device cuda --profile`` also proves that each operator runs kernels of normfused,
and on which device. Without ``--profile`` it is the program that compute-sanitizer watches: tensors are created and
compared on the CPU, so that only normfused's kernels run. ``--planted`` frees a tensor before an operator reads it, to
check that the sanitizer reports the fault.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from proof import Kernels, prove
from torch import Tensor

import normfused

ops = torch.ops.normfused
EPS, MOMENTUM = 1e-5, 0.1
# Rows in one block per channel; masked rows in several splits; columns; repeated columns.
SHAPES = ((8, 64, 8, 8), (32, 3, 65, 33), (16, 40, 9, 11), (64, 128, 7, 7))
TINY = ((4, 6, 5, 5),)
FORMATS = (torch.contiguous_format, torch.channels_last)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
Results = Sequence[Tensor]


class Inputs:
    """The tensors of one call: the same values on each device and, up to rounding, in each dtype."""

    def __init__(self, shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*sides: int) -> Tensor:
            return torch.randn(sides, generator=generator)

        channels = shape[1]
        self.x, self.grad, self.residual = (
            normal(*shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(3)
        )
        self.weight, self.bias, self.running_mean = normal(channels) + 2, normal(channels), normal(channels)
        self.running_var = normal(channels).square() + 0.5
        self.statistics = torch.stack([normal(channels), normal(channels).square() + 0.5]).double()
        self.batches = torch.tensor(3)

    def on(self, device: str, *, double: bool = False) -> Inputs:
        """A copy on a device, in float64 if `double`."""
        other = object.__new__(Inputs)
        for name, tensor in vars(self).items():
            wide = tensor.double() if double and tensor.is_floating_point() else tensor
            setattr(other, name, wide.to(device, copy=True))
        return other


def batch_norm_training(i: Inputs) -> Results:
    buffers = (i.running_mean, i.running_var, i.batches)
    y, statistics, _ = ops.batch_norm_training(
        i.x, i.weight, i.bias, *buffers, MOMENTUM, EPS, i.residual, "relu", 0.0, True
    )
    return y, statistics, *buffers


def batch_norm_inference(i: Inputs) -> Results:
    return ops.batch_norm_inference(i.x, i.weight, i.bias, i.running_mean, i.running_var, EPS, None, "silu")[:1]  # type: ignore[no-any-return]


def batch_norm_training_(i: Inputs) -> Results:
    buffers = (i.running_mean, i.running_var, i.batches)
    statistics = ops.batch_norm_training_(i.x, i.weight, i.bias, *buffers, MOMENTUM, EPS, "leaky_relu", 0.25)
    return i.x, statistics, *buffers


def batch_norm_inference_(i: Inputs) -> Results:
    ops.batch_norm_inference_(i.x, i.weight, i.bias, i.running_mean, i.running_var, EPS)
    return (i.x,)


def batch_norm_backward(i: Inputs) -> Results:
    mask = [True, True, True, False]
    return ops.batch_norm_backward(i.grad, i.x, i.weight, i.statistics, True, mask)[:3]  # type: ignore[no-any-return]


def batch_norm_by_statistics(i: Inputs) -> Results:
    return ops.batch_norm_by_statistics(i.x, i.statistics, i.weight, i.bias)[:1]  # type: ignore[no-any-return]


def pack_moments(i: Inputs) -> Results:
    """Only merge_ranks can read the packed words; here it merges those of two equal ranks."""
    words = ops.pack_moments(i.x, 1e-5)
    return merge(i, torch.stack([words, words]))


def merge_ranks(i: Inputs) -> Results:
    return merge(i, ops.pack_moments(i.x, 1e-5)[None])


def merge(i: Inputs, words: Tensor) -> Results:
    buffers = (i.running_mean, i.running_var, i.batches)
    count = i.x.numel() // i.x.size(1)
    statistics, total = ops.merge_ranks(words, i.x.size(1), count, *buffers, MOMENTUM, EPS)
    return statistics, total, *buffers


def channel_moments(i: Inputs) -> Results:
    return ops.channel_moments(i.x)  # type: ignore[no-any-return]


def channel_sums(i: Inputs) -> Results:
    return ops.channel_sums(i.x)  # type: ignore[no-any-return]


def integer_sums(i: Inputs) -> Results:
    factors = {torch.int8: 30, torch.int16: 8000, torch.int32: 2**28, torch.int64: 2**40}
    x = i.x.double().clamp(-4, 4).nan_to_num()  # conversion of what does not fit differs between devices
    return tuple(ops.integer_sums((x * factor).to(dtype)) for dtype, factor in factors.items())


def constants(i: Inputs) -> tuple[list[float], list[float]]:
    return [0.5 + c / 64 for c in range(i.x.size(1))], [0.25 + c / 64 for c in range(i.x.size(1))]


def standardize(i: Inputs) -> Results:
    return (ops.standardize(i.x, *constants(i), 0.5, None, torch.contiguous_format),)


def standardize_out(i: Inputs) -> Results:
    ops.standardize_out(i.x, *constants(i), 0.5, i.grad)
    return (i.grad,)


def standardize_(i: Inputs) -> Results:
    ops.standardize_(i.x, *constants(i))
    return (i.x,)


def local_response_norm(i: Inputs) -> Results:
    return (ops.local_response_norm(i.x, 5, 0.1, 0.75, 1.0),)


def local_response_norm_backward(i: Inputs) -> Results:
    return (ops.local_response_norm_backward(i.grad, i.x, 5, 0.1, 0.75, 1.0),)


def group_norm(i: Inputs) -> Results:
    return ops.group_norm(i.x, 1, i.weight, i.bias, EPS, i.residual, "silu")[:2]  # type: ignore[no-any-return]


def group_norm_backward(i: Inputs) -> Results:
    statistics = ops.group_norm(i.x, 1, i.weight, i.bias, EPS)[1]
    mask = [True, True, True, False]
    return ops.group_norm_backward(i.grad, i.x, 1, i.weight, statistics, mask)[:3]  # type: ignore[no-any-return]


def layer_norm(i: Inputs) -> Results:
    return ops.layer_norm(i.x, 1, 1, i.weight, i.bias, EPS, i.residual)  # type: ignore[no-any-return]


def layer_norm_backward(i: Inputs) -> Results:
    statistics = ops.layer_norm(i.x, 1, 1, i.weight, i.bias, EPS)[2]
    gradients = (i.grad, i.x, 1, 1, i.weight, i.bias, statistics, [True] * 3, i.residual)
    return ops.layer_norm_backward(*gradients)  # type: ignore[no-any-return]


OPERATORS: dict[str, Callable[[Inputs], Results]] = {
    function.__name__: function
    for function in (
        *(batch_norm_training, batch_norm_inference, batch_norm_training_, batch_norm_inference_),
        *(batch_norm_backward, batch_norm_by_statistics, pack_moments, merge_ranks),
        *(channel_moments, channel_sums, integer_sums, standardize, standardize_out, standardize_),
        *(local_response_norm, local_response_norm_backward, group_norm, group_norm_backward),
        *(layer_norm, layer_norm_backward),
    )
}


def check(name: str, inputs: Inputs, device: str) -> None:
    """Asserts that an operator's results agree with those of the CPU in float64."""
    got = OPERATORS[name](inputs.on(device))
    exact = OPERATORS[name](inputs.on("cpu", double=True))
    for index, (a, e) in enumerate(zip(got, exact, strict=True)):
        error = ((a.cpu().double() - e.double()).abs().max() / e.double().abs().max()).item()
        allowed = TOLERANCE[inputs.x.dtype]
        assert error <= allowed, f"{name} {tuple(inputs.x.shape)}: result {index} is off by {error:.1e}"


def run(device: str, shapes: Sequence[tuple[int, ...]], profile: bool) -> list[dict[str, Any]]:
    """Checks all operators. Returns one row per operator, with `profile` including the kernels that it ran."""
    variants = [(s, f, d) for s in shapes for f in FORMATS for d in TOLERANCE]
    rows = []
    with torch.no_grad():
        for name in OPERATORS:
            row: dict[str, Any] = {"operator": name, "inputs": len(variants)}
            try:
                for variant in variants:
                    check(name, Inputs(*variant), device)
                row |= _kernels(name, device) if profile else {}
                print(f"{name}: right for {len(variants)} inputs{_said(row)}", flush=True)
            except Exception as error:  # the other operators are still checked
                row["failure"] = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{name}: {row['failure']}", flush=True)
            rows.append(row)
    return rows


def _kernels(name: str, device: str) -> dict[str, Any]:
    inputs = Inputs((64, 128, 7, 7), torch.contiguous_format, torch.bfloat16).on(device)
    kernels: Kernels = prove(name, lambda: OPERATORS[name](inputs), ours=True)
    names = {index: torch.cuda.get_device_name(index) for index in kernels.devices}
    return {"ours": dict(kernels.ours), "others": dict(kernels.others), "devices": names}


def _said(row: dict[str, Any]) -> str:
    if "ours" not in row:
        return ""
    return f"; {sum(row['ours'].values())} kernels of normfused on {', '.join(row['devices'].values())}"


def planted() -> None:
    """Reads a freed tensor. Needs torch's caching allocator off, so that the tensor is an allocation of its own."""
    x = torch.randn(32, 3, 65, 33).cuda()
    torch.cuda.synchronize()
    # The runtime library that torch has loaded.
    major = (torch.version.cuda or "").partition(".")[0]
    error = ctypes.CDLL(f"libcudart.so.{major}").cudaFree(ctypes.c_void_p(x.data_ptr()))
    print(f"freed with status {error}", flush=True)
    try:
        ops.channel_sums(x)
        torch.cuda.synchronize()
        print("read")
    finally:
        sys.stdout.flush()
        os._exit(0)  # torch would free the tensor again


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--profile", action="store_true", help="also prove whose kernels ran; CUDA only")
    parser.add_argument("--few", action="store_true", help="two of the four shapes")
    parser.add_argument("--tiny", action="store_true", help="one small shape, for a rehearsal")
    parser.add_argument("--planted", action="store_true", help="only read freed memory; CUDA only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    arguments = parser.parse_args()
    assert normfused.info()["extension"] == "loaded", normfused.info()["fallback_reason"]
    if arguments.planted:
        planted()
    shapes = TINY if arguments.tiny else SHAPES[:2] if arguments.few else SHAPES
    rows = run(arguments.device, shapes, arguments.profile)
    if arguments.out:
        arguments.out.write_text(json.dumps({"device": arguments.device, "operators": rows}, indent=1) + "\n")
    if failed := [row["operator"] for row in rows if "failure" in row]:
        print(f"{len(failed)} of {len(rows)} operators failed: {', '.join(failed)}")
        return 1
    proven = "our kernels ran for each" if arguments.profile else "whose kernels ran was not looked at"
    print(f"{len(rows)} operators right on {arguments.device}; {proven}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
