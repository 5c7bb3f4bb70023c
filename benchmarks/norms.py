"""Norms whose statistics are those of one sample, compared with eager torch and with copies.

``python benchmarks/norms.py`` writes norms.json and norms.md to results/<device>/.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import command
import tables
import torch
from cases import DTYPES, WRONG, dtype_name
from timing import FULL, TINY, Budget, interleave, make_stopwatch, ratios, samplers
from torch import Tensor, nn
from torch.nn import functional as F

import normfused

GROUPS = 32
IMAGES = ((2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (1, 128, 256, 256))  # of diffusion models
VOLUMES = ((4, 32, 128, 128), (2, 32, 48, 48, 48))
LAYOUTS = ("channels first", "channels last")
Step = Callable[[], Sequence[Tensor]]


class Norm(NamedTuple):
    """A layer of ours, torch's layers with the same result, and the shapes."""

    ours: Callable[[int], nn.Module]
    torchs: Callable[[int], nn.Module]
    after: Callable[[Tensor], Tensor]
    shapes: tuple[tuple[int, ...], ...]
    target: float  # of the geometric mean of forward + backward over eager torch


def _instance(layers: Any) -> Callable[[int], nn.Module]:
    return lambda channels: layers(channels, affine=True)


NORMS = {
    "GroupNorm": Norm(
        lambda channels: normfused.GroupNorm(GROUPS, channels),
        lambda channels: nn.GroupNorm(GROUPS, channels),
        lambda z: z,
        IMAGES,
        2.5,
    ),
    "GroupNorm + SiLU": Norm(
        lambda channels: normfused.GroupNormAct(GROUPS, channels, "silu"),
        lambda channels: nn.GroupNorm(GROUPS, channels),
        F.silu,
        IMAGES,
        4,
    ),
    "InstanceNorm2d": Norm(
        _instance(normfused.InstanceNorm2d), _instance(nn.InstanceNorm2d), lambda z: z, VOLUMES[:1], 6
    ),
    "InstanceNorm3d": Norm(
        _instance(normfused.InstanceNorm3d), _instance(nn.InstanceNorm3d), lambda z: z, VOLUMES[1:], 6
    ),
}
OPERATIONS = ("forward", "forward + backward")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """`x` in a memory layout."""
    return x if layout == "channels first" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def calls(norm: Norm, x: Tensor, grad: Tensor) -> dict[str, dict[str, Step]]:
    """For each operation the calls of normfused, torch and a copy."""
    leaf = x.detach().requires_grad_()
    layers = [make(x.size(1)).to(x.device) for make in (norm.ours, norm.torchs)]
    functions = {"normfused": layers[0], "torch": lambda t: norm.after(layers[1](t))}
    buffer = torch.empty_like(x)

    def forward(function: Callable[[Tensor], Tensor]) -> Step:
        def call() -> Sequence[Tensor]:
            with torch.no_grad():
                return (function(x),)

        return call

    def both(function: Callable[[Tensor], Tensor], layer: nn.Module) -> Step:
        inputs = (leaf, *layer.parameters())
        return lambda: torch.autograd.grad(function(leaf), inputs, grad)

    copy: Step = lambda: (buffer.copy_(x),)  # noqa: E731
    return {
        "forward": {**{name: forward(f) for name, f in functions.items()}, "copy": copy},
        "forward + backward": {
            **{name: both(f, layer) for (name, f), layer in zip(functions.items(), layers, strict=True)},
            "copy": copy,
        },
    }


def check(what: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Asserts that the results agree."""
    for a, b in zip(ours, theirs, strict=True):
        error = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        assert error <= WRONG[dtype], f"{what}: relative error {error:.1e}"


def measure_norm(name: str, device: str, shapes: Sequence[tuple[int, ...]], budget: Budget) -> list[dict[str, Any]]:
    """Rows of one norm: medians over the rounds of torch / normfused and of normfused / copy."""
    rows = []
    for shape, dtype, layout in ((s, d, lay) for s in shapes for d in DTYPES for lay in LAYOUTS):
        x, grad = (lay_out(torch.randn(shape, device=device).to(dtype), layout) for _ in range(2))
        case = {"norm": name, "shape": shape, "dtype": dtype_name(dtype), "layout": layout}
        for operation, peers in calls(NORMS[name], x, grad).items():
            check(f"{case}", peers["normfused"](), peers["torch"](), dtype)
            stopwatch = make_stopwatch(device)
            samples = interleave(samplers(peers, stopwatch), budget)
            speedup, copies = ratios(samples, "torch", "normfused"), ratios(samples, "normfused", "copy")
            figures = {"speedup": statistics.median(speedup), "copies": statistics.median(copies)}
            rows.append({**case, "operation": operation, **figures})
        print(f"{name} {'x'.join(map(str, shape))} {case['dtype']} {layout}", flush=True)
    return rows


def measure(device: str) -> list[dict[str, Any]]:
    """All cases."""
    return [row for name, norm in NORMS.items() for row in measure_norm(name, device, norm.shapes, FULL)]


def rehearse(device: str) -> list[dict[str, Any]]:
    """Small shapes."""
    return [
        row
        for name, norm in NORMS.items()
        for row in measure_norm(name, device, [(2, GROUPS, *[3] * (len(norm.shapes[0]) - 2))], TINY)
    ]


def render(description: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The geometric means of each norm with their targets, and all cases."""
    means = []
    for name, norm in NORMS.items():
        for operation in OPERATIONS:
            own = [row for row in rows if (row["norm"], row["operation"]) == (name, operation)]
            mean = statistics.geometric_mean(row["speedup"] for row in own)
            is_target = operation == "forward + backward"
            target = f"≥ {norm.target:g}×" if is_target else ""
            verdict = "" if not is_target else "reached" if mean >= norm.target else "**not reached**"
            copies = statistics.geometric_mean(row["copies"] for row in own)
            least = min(row["speedup"] for row in own)
            means.append((f"{name}, {operation}", f"{mean:.2f}×", f"{least:.2f}×", target, verdict, f"{copies:.2f}"))
    details = [
        (
            f"{row['norm']}, {row['operation']}",
            "x".join(map(str, row["shape"])),
            row["dtype"],
            row["layout"],
            f"{row['speedup']:.2f}×",
            f"{row['copies']:.2f}",
        )
        for row in rows
    ]
    parts = [
        f"# Norms of one sample: {description.get('gpu', description['cpu'])}",
        command.versions(description),
        "Medians over interleaved rounds of the ratio to eager torch in the same round, and of the time in copies of "
        "the tensor; geometric means over shapes, dtypes and layouts.",
        tables.table(("", "speedup over torch", "least", "target", "", "copies"), means),
        "## All cases",
        tables.table(("", "shape", "dtype", "layout", "speedup over torch", "copies"), details, text_columns=4),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(command.run(__doc__, "norms", measure, render, rehearse))
