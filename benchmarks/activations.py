"""What an activation costs: forward and backward with each, against ReLU's and against torch's separate layers.

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
from timing import FULL, TINY, Budget, interleave, make_stopwatch, ratios
from torch import Tensor, nn

import normfused
from normfused.activations import ACTIVATION_PARAMS, ACTIVATIONS

# Its time over ReLU's at most; the others take exponentials.
CHEAP = {"identity": 1.15, "relu6": 1.15, "leaky_relu": 1.15, "hardswish": 1.15}
COSTLY = 2.0


def calls(x: Tensor, grad: Tensor) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """Forward and backward with each activation, by normfused and by torch.nn's layers."""
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
        result[f"torch {name}"] = step(lambda t, n=stock, f=function, p=parameter: f(n(t), p), stock)  # type: ignore[misc]
    return result


@torch.no_grad()
def check(x: Tensor) -> None:
    """Assert that each activation's output is torch's in float64, by both peers."""
    parameter_dtype = torch.promote_types(x.dtype, torch.float32)
    exact = nn.BatchNorm2d(x.size(1), device=x.device, dtype=torch.float64)(x.double())
    for name, function in ACTIVATIONS.items():
        parameter = ACTIVATION_PARAMS.get(name, 0.0)
        ours = normfused.BatchNormAct2d(x.size(1), activation=name, device=x.device, dtype=parameter_dtype)
        stock = nn.BatchNorm2d(x.size(1), device=x.device, dtype=parameter_dtype)
        want = function(exact, parameter)
        for peer, got in (("normfused", ours(x)), ("torch", function(stock(x), parameter))):
            error = ((got - want).abs().max() / want.abs().max()).item()
            assert error <= WRONG[x.dtype], f"{name}, {tuple(x.shape)}: {peer} is off by {error:.1e}"


def rehearse(device: str) -> list[dict[str, Any]]:
    return measure(device, 2, ((5, 3),), TINY)


def measure(
    device: str, batch: int = 32, shapes: Sequence[tuple[int, int]] = QUICK, budget: Budget = FULL
) -> list[dict[str, Any]]:
    """Medians over the rounds of each case: time over ReLU's, and torch's time over ours."""
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
                samples = interleave(steps, stopwatch, budget)
                case = {"shape": shape, "dtype": dtype_name(dtype), "layout": layout}
                for name in ACTIVATIONS:
                    to_relu = statistics.median(ratios(samples, name, "relu"))
                    speedup = statistics.median(ratios(samples, f"torch {name}", name))
                    rows.append({**case, "activation": name, "to_relu": to_relu, "speedup": speedup})
                print(f"{'x'.join(map(str, shape))} {case['dtype']} {layout}", flush=True)
    return rows


def render(description: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Geometric means over the cases, and the worst of them."""
    lines = []
    for name in ACTIVATIONS:
        mine = [row for row in rows if row["activation"] == name]
        cost = [row["to_relu"] for row in mine]
        mean, bound = statistics.geometric_mean(cost), CHEAP.get(name, COSTLY)
        verdict = "" if name == "relu" else "reached" if mean <= bound else "**not reached**"
        faster = statistics.geometric_mean(row["speedup"] for row in mine)
        limit = "" if name == "relu" else f"≤ {bound:.3g}×"
        lines.append((name, f"{mean:.2f}×", f"{max(cost):.2f}×", limit, verdict, f"{faster:.2f}×"))
    parts = [
        f"# Activations: {description.get('gpu', description['cpu'])}",
        command.versions(description),
        f"Batch norm with the activation, forward + backward in training, over {len(rows) // len(ACTIVATIONS)} cases "
        "(shapes, dtypes, layouts); medians of rounds in which each ran once.",
        tables.table(
            ("activation", "time over ReLU's, mean", "worst", "target for the mean", "", "times faster than torch"),
            lines,
        ),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(command.run(__doc__, "activations", measure, render, rehearse))
