"""Norms whose statistics are those of one sample, compared with eager torch and with copies.

``python benchmarks/norms.py`` writes norms.json, norms.md and norms.svg to results/<device>/.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
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
STAGES = ((32, 96, 56, 56), (32, 192, 28, 28), (32, 384, 14, 14))  # of ConvNeXt
TOKENS = ((4096, 768), (8192, 1024), (2048, 4096), (64, 197, 768))
LAYOUTS = ("channels first", "channels last")
Step = Callable[[], Sequence[Tensor]]
Layer = Callable[[int], nn.Module]


def _plain(layer: nn.Module, x: Tensor, other: Tensor) -> Sequence[Tensor]:
    return (layer(x),)


class Norm(NamedTuple):
    """A layer of ours, torch's layer, how they are called for the same results, and the shapes."""

    ours: Layer
    torchs: Layer
    shapes: tuple[tuple[int, ...], ...]
    target: float  # of the geometric mean of forward + backward over eager torch
    call: Callable[[nn.Module, Tensor, Tensor], Sequence[Tensor]] = _plain
    call_torchs: Callable[[nn.Module, Tensor, Tensor], Sequence[Tensor]] = _plain
    over_channels: bool = True  # else over the last dimension, in one layout

    def layouts(self) -> Sequence[str]:
        return LAYOUTS if self.over_channels else LAYOUTS[:1]

    def channels(self, shape: Sequence[int]) -> int:
        return shape[1 if self.over_channels else -1]

    def is_sum(self) -> bool:
        """Whether the calls read a second tensor."""
        return self.call is _add_ours


def _instance(layers: Any) -> Layer:
    return lambda channels: layers(channels, affine=True)


def _rms(layers: Any) -> Layer:
    return lambda channels: layers(channels, eps=1e-6)


def _silu_after(layer: nn.Module, x: Tensor, other: Tensor) -> Sequence[Tensor]:
    return (F.silu(layer(x)),)


def _permuted(layer: nn.Module, x: Tensor, other: Tensor) -> Sequence[Tensor]:
    return (layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),)


def _add_ours(layer: nn.Module, x: Tensor, other: Tensor) -> Sequence[Tensor]:
    return layer(x, other)  # type: ignore[no-any-return]


def _add_torchs(layer: nn.Module, x: Tensor, other: Tensor) -> Sequence[Tensor]:
    total = x + other
    return layer(total), total


def _group(channels: int) -> nn.Module:
    return nn.GroupNorm(GROUPS, channels)


NORMS = {
    "GroupNorm": Norm(lambda channels: normfused.GroupNorm(GROUPS, channels), _group, IMAGES, 2.5),
    "GroupNorm + SiLU": Norm(
        lambda channels: normfused.GroupNormAct(GROUPS, channels, "silu"), _group, IMAGES, 4, call_torchs=_silu_after
    ),
    "InstanceNorm2d": Norm(_instance(normfused.InstanceNorm2d), _instance(nn.InstanceNorm2d), VOLUMES[:1], 6),
    "InstanceNorm3d": Norm(_instance(normfused.InstanceNorm3d), _instance(nn.InstanceNorm3d), VOLUMES[1:], 6),
    "LayerNorm": Norm(normfused.LayerNorm, nn.LayerNorm, TOKENS, 2, over_channels=False),
    "add + LayerNorm": Norm(normfused.LayerNorm, nn.LayerNorm, TOKENS, 2, _add_ours, _add_torchs, False),
    "RMSNorm": Norm(_rms(normfused.RMSNorm), _rms(nn.RMSNorm), TOKENS, 8, over_channels=False),
    "add + RMSNorm": Norm(_rms(normfused.RMSNorm), _rms(nn.RMSNorm), TOKENS, 3, _add_ours, _add_torchs, False),
    "LayerNorm2d": Norm(
        normfused.LayerNorm2d, lambda channels: nn.LayerNorm(channels, eps=1e-6), STAGES, 8, call_torchs=_permuted
    ),
}
OPERATIONS = ("forward", "forward + backward")


def floor(norm: Norm, operation: str) -> float:
    """Copies of the tensor that move as many bytes as the operation must, each once.

    Forward reads a tensor and writes one, backward reads two and writes one. With an addition, both read one more, and
    forward also writes the sum.
    """
    forward, backward = (2.0, 2.0) if norm.is_sum() else (1.0, 1.5)
    return forward if operation == "forward" else forward + backward


def lay_out(x: Tensor, layout: str) -> Tensor:
    """`x` in a memory layout."""
    return x if layout == "channels first" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def calls(norm: Norm, x: Tensor, other: Tensor, grad: Tensor) -> dict[str, dict[str, Step]]:
    """For each operation the calls of normfused, torch and a copy."""
    leaves = [t.detach().requires_grad_() for t in ((x, other) if norm.is_sum() else (x,))]
    layers = [make(norm.channels(x.shape)).to(x.device, x.dtype) for make in (norm.ours, norm.torchs)]
    functions = {"normfused": (norm.call, layers[0]), "torch": (norm.call_torchs, layers[1])}
    buffer = torch.empty_like(x)

    def forward(function: Any, layer: nn.Module) -> Step:
        def call() -> Sequence[Tensor]:
            with torch.no_grad():
                return function(layer, x, other)  # type: ignore[no-any-return]

        return call

    def both(function: Any, layer: nn.Module) -> Step:
        def call() -> Sequence[Tensor]:
            outputs = function(layer, leaves[0], leaves[-1])
            return torch.autograd.grad(outputs, (*leaves, *layer.parameters()), [grad] * len(outputs))

        return call

    copy: Step = lambda: (buffer.copy_(x),)  # noqa: E731
    return {
        "forward": {**{name: forward(*f) for name, f in functions.items()}, "copy": copy},
        "forward + backward": {**{name: both(*f) for name, f in functions.items()}, "copy": copy},
    }


def check(what: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Asserts that the results agree with those of torch in float64."""
    for a, b in zip(ours, theirs, strict=True):
        error = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        assert error <= WRONG[dtype], f"{what}: relative error {error:.1e}"


def measure_norm(name: str, device: str, shapes: Sequence[tuple[int, ...]], budget: Budget) -> list[dict[str, Any]]:
    """Rows of one norm: medians over the rounds of torch / normfused and of normfused / copy."""
    rows = []
    norm = NORMS[name]
    for shape, dtype, layout in itertools.product(shapes, DTYPES, norm.layouts()):
        x, other, grad = (lay_out(torch.randn(shape, device=device).to(dtype), layout) for _ in range(3))
        # torch's gradients of bfloat16 parameters are off by up to 9 %.
        exact = calls(norm, x.double(), other.double(), grad.double())
        case = {"norm": name, "shape": shape, "dtype": dtype_name(dtype), "layout": layout}
        for operation, peers in calls(norm, x, other, grad).items():
            check(f"{case}", peers["normfused"](), exact[operation]["torch"](), dtype)
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
            bound = mean * copies / floor(norm, operation)
            least = min(row["speedup"] for row in own)
            means.append(
                (
                    f"{name}, {operation}",
                    f"{mean:.2f}×",
                    f"{least:.2f}×",
                    target,
                    verdict,
                    f"{copies:.2f}",
                    f"{bound:.2f}×",
                )
            )
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
        "the tensor; geometric means over shapes, dtypes and layouts. *Bound*: the speedup if each byte were moved "
        "once, at the speed of the copy.",
        tables.table(("", "speedup over torch", "least", "target", "", "copies", "bound"), means),
        "![Speed compared with eager torch](norms.svg)",
        "## All cases",
        tables.table(("", "shape", "dtype", "layout", "speedup over torch", "copies"), details, text_columns=4),
    ]
    return "\n\n".join(parts) + "\n"


def draw(description: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> None:
    """Writes norms.svg, if matplotlib is installed. A GPU machine may lack it."""
    if find_spec("matplotlib") is None:
        return print("no plot: matplotlib is not installed")
    import plots

    plots.draw_norms(description, rows, folder)


if __name__ == "__main__":
    sys.exit(command.run(__doc__, "norms", measure, render, rehearse, draw))
