"""Cost of each activation fused with batch norm, compared with ReLU and with torch's separate layers.

``python benchmarks/activations.py`` writes activations.json and activations.md to results/<device>/.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import command
import tables
import torch
from cases import DTYPES, LAYOUTS, MEMORY_FORMATS, QUICK, WRONG, dtype_name
from timing import FULL, TINY, Budget, interleave, make_stopwatch, ratios, samplers
from torch import Tensor, nn

import normfused
from normfused.activations import ACTIVATION_PARAMS, ACTIVATIONS

# Maximum time relative to ReLU. The activations not listed compute exponentials or the error function.
CHEAP = {"identity": 1.15, "relu6": 1.15, "leaky_relu": 1.15, "hardswish": 1.15}
COSTLY = 2.0


def calls(x: Tensor, grad: Tensor) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """Calls of forward + backward with each activation: ``name`` for normfused and ``torch name`` for torch.nn."""
    leaf = x.detach().requires_grad_()
    dtype = torch.promote_types(x.dtype, torch.float32)

    def step(forward: Callable[[Tensor], Tensor], norm: nn.Module) -> Callable[[], Sequence[Tensor]]:
        inputs = (leaf, *norm.parameters())
        return lambda: torch.autograd.grad(forward(leaf), inputs, grad)

    result = {}
    for name, function in ACTIVATIONS.items():
        ours = normfused.BatchNormAct2d(x.size(1), activation=name, device=x.device, dtype=dtype)
        stock = nn.BatchNorm2d(x.size(1), device=x.device, dtype=dtype)
        parameter = ACTIVATION_PARAMS.get(name, 0.0)
        result[name] = step(ours, ours)
        separate = lambda t, norm=stock, f=function, p=parameter: f(norm(t), p)  # noqa: E731
        result[f"torch {name}"] = step(separate, stock)
    return result


@torch.no_grad()
def check(x: Tensor) -> None:
    """Asserts that both peers' outputs agree with torch's in float64, for each activation."""
    parameter_dtype = torch.promote_types(x.dtype, torch.float32)
    exact = nn.BatchNorm2d(x.size(1), device=x.device, dtype=torch.float64)(x.double())
    for name, function in ACTIVATIONS.items():
        parameter = ACTIVATION_PARAMS.get(name, 0.0)
        ours = normfused.BatchNormAct2d(x.size(1), activation=name, device=x.device, dtype=parameter_dtype)
        stock = nn.BatchNorm2d(x.size(1), device=x.device, dtype=parameter_dtype)
        expected = function(exact, parameter)
        for peer, actual in (("normfused", ours(x)), ("torch", function(stock(x), parameter))):
            error = ((actual - expected).abs().max() / expected.abs().max()).item()
            what = f"{name}, {tuple(x.shape)}: relative error of {peer} is {error:.1e}"
            assert error <= WRONG[x.dtype], what


def rehearse(device: str) -> list[dict[str, Any]]:
    """One small shape."""
    return measure(device, 2, ((5, 3),), TINY)


def measure(
    device: str, batch: int = 32, shapes: Sequence[tuple[int, int]] = QUICK, budget: Budget = FULL
) -> list[dict[str, Any]]:
    """Medians over the rounds of each case: time relative to ReLU, and time of torch / time of normfused."""
    rows = []
    for channels, side in shapes:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                stopwatch = make_stopwatch(device)
                shape = (batch, channels, side, side)
                x, grad = (
                    torch.randn(shape, device=device).to(dtype, memory_format=MEMORY_FORMATS[layout]) for _ in range(2)
                )
                check(x)
                steps = calls(x, grad)
                for call in [*steps.values()] * 2:
                    stopwatch(call)
                samples = interleave(samplers(steps, stopwatch), budget)
                case = {"shape": shape, "dtype": dtype_name(dtype), "layout": layout}
                for name in ACTIVATIONS:
                    to_relu = statistics.median(ratios(samples, name, "relu"))
                    speedup = statistics.median(ratios(samples, f"torch {name}", name))
                    rows.append({**case, "activation": name, "to_relu": to_relu, "speedup": speedup})
                print(f"{'x'.join(map(str, shape))} {case['dtype']} {layout}", flush=True)
    return rows


def render(description: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One line per activation: geometric means over the cases, and the maximum."""
    lines = []
    for name in ACTIVATIONS:
        own_rows = [row for row in rows if row["activation"] == name]
        costs = [row["to_relu"] for row in own_rows]
        mean, bound = statistics.geometric_mean(costs), CHEAP.get(name, COSTLY)
        verdict = "" if name == "relu" else "reached" if mean <= bound else "**not reached**"
        speedup = statistics.geometric_mean(row["speedup"] for row in own_rows)
        limit = "" if name == "relu" else f"≤ {bound:.3g}×"
        lines.append((name, f"{mean:.2f}×", f"{max(costs):.2f}×", limit, verdict, f"{speedup:.2f}×"))
    what = f"Batch norm with the activation, forward + backward in training, {len(rows) // len(ACTIVATIONS)} cases"
    header = ("activation", "time relative to ReLU", "maximum", "target for the mean", "", "speedup over torch")
    parts = [
        f"# Activations: {description.get('gpu', description['cpu'])}",
        command.versions(description),
        f"{what} (shapes, dtypes, layouts). Each round runs every call once. "
        "Geometric means over the cases of the medians over the rounds.",
        tables.table(header, lines),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(command.run(__doc__, "activations", measure, render, rehearse))
