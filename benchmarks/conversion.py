"""Cost of calling a converted model, compared with the original and with replaced layers without fusion.

``python benchmarks/conversion.py`` writes conversion.json and conversion.md to results/<device>/.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import command
import tables
import torch
from resnet50 import resnet50
from timing import FULL, Budget, interleave, make_stopwatch, ratios, samplers
from torch import Tensor, nn

import normfused

Row = dict[str, Any]
LONG = Budget(seconds=5.0, min_rounds=5)


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())


def stack() -> nn.Module:
    return nn.Sequential(*(block() for _ in range(16)))


CASES: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("one small block", block, (1, 8, 4, 4)),
    ("16 small blocks", stack, (1, 8, 4, 4)),
    ("ResNet-50", lambda: resnet50(lambda: nn.ReLU(inplace=True)), (1, 3, 224, 224)),
    ("ResNet-50", lambda: resnet50(lambda: nn.ReLU(inplace=True)), (32, 3, 224, 224)),
]


def step(model: nn.Module, x: Tensor, training: bool) -> Callable[[], Any]:
    """A call of forward + backward in training, or of forward in evaluation."""
    parameters = [*model.parameters()]
    model.train(training)

    def train() -> Any:
        return torch.autograd.grad(model(x).sum(), parameters)

    def evaluate() -> Any:
        with torch.no_grad():
            return model(x)

    return train if training else evaluate


def measure(device: str) -> list[Row]:
    """One row per model and mode: medians over the rounds, and the seconds of the converted model's first call."""
    stopwatch = make_stopwatch(device, host=True)
    rows = []
    for name, make, shape in CASES:
        torch.manual_seed(0)
        stock = make().to(device)
        x = torch.randn(shape, device=device)
        for training in (True, False):
            models = {
                "torch.nn": copy.deepcopy(stock),
                "ours": normfused.convert(copy.deepcopy(stock), fuse=False),
                "converted": normfused.convert(copy.deepcopy(stock)),
            }
            calls = {peer: step(model, x, training) for peer, model in models.items()}
            start = time.perf_counter()
            calls["converted"]()
            first = time.perf_counter() - start
            for call in [*calls.values()] * 2:
                call()
            samples = interleave(samplers(calls, stopwatch), LONG if name == "ResNet-50" else FULL)
            rows.append(
                {
                    "model": name,
                    "batch": shape[0],
                    "mode": "forward + backward" if training else "eval, forward",
                    "seconds": {peer: statistics.median(values) for peer, values in samples.items()},
                    "to_torch": statistics.median(ratios(samples, "converted", "torch.nn")),
                    "to_ours": statistics.median(ratios(samples, "converted", "ours")),
                    "first_call": first,
                }
            )
            print(f"{name}, batch {shape[0]}, {rows[-1]['mode']}", flush=True)
    return rows


def render(description: dict[str, Any], rows: list[Row]) -> str:
    """One line per model and mode."""
    lines = [
        (
            f"{row['model']}, batch {row['batch']}, {row['mode']}",
            *(f"{1e3 * row['seconds'][peer]:.3g} ms" for peer in ("torch.nn", "ours", "converted")),
            f"{row['to_torch']:.2f}×",
            f"{row['to_ours']:.2f}×",
            f"{row['first_call']:.2g} s",
        )
        for row in rows
    ]
    header = (
        *("model", "torch.nn", "replaced layers", "converted"),
        *("converted / torch.nn", "converted / replaced layers", "first call"),
    )
    parts = [
        f"# Converted models: {description.get('gpu', description['cpu'])}",
        command.versions(description),
        "`normfused.convert(model)` compared with the original model and with `convert(model, fuse=False)`, which "
        "replaces layers without fusing. float32, medians over rounds that run every call once. The first call of a "
        "converted model captures its graph. The second batch size captures it once more.",
        tables.table(header, lines),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(command.run(__doc__, "conversion", measure, render))
