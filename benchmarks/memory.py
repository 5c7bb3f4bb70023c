"""Memory of training, by implementation of batch norm and activation: ``python benchmarks/memory.py``.

Writes memory.json, memory.md and memory.svg to results/<device>/: the bytes that batch norm and activation save for
backward, for the nine shapes of ResNet-50, and the saved bytes and peak memory of one training step of ResNet-50.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import plots
import tables
import torch
from cases import RESNET50
from resnet50 import frozen, images, resnet50
from torch import Tensor, nn

import normfused
from normfused.conversion import bytes_saved_for_backward


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a model computes batch norm and activation: with layers of `activation`, changed by `change`."""

    title: str
    activation: Callable[[], nn.Module]
    change: Callable[[nn.Module], nn.Module] = lambda model: model


def _converted(model: nn.Module, inplace: bool = False) -> nn.Module:
    return normfused.convert(model, inplace=inplace)


MODES = {
    "relu": Mode("torch.nn, ReLU", nn.ReLU),
    "relu_": Mode("torch.nn, ReLU in place", lambda: nn.ReLU(inplace=True)),
    "convert": Mode("converted", lambda: nn.ReLU(inplace=True), _converted),
    "leaky_": Mode("torch.nn, leaky ReLU in place", lambda: nn.LeakyReLU(inplace=True)),
    "inplace": Mode(
        "converted in place (leaky ReLU)",
        lambda: nn.LeakyReLU(inplace=True),
        lambda model: _converted(model, inplace=True),
    ),
    "frozen_relu_": Mode("torch.nn, frozen, ReLU in place", lambda: nn.ReLU(inplace=True), frozen),
    "frozen_convert": Mode("converted, frozen", lambda: nn.ReLU(inplace=True), lambda m: frozen(_converted(m))),
}


# The mode of torch.nn that each mode of normfused is compared with.
BASES = {"convert": "relu_", "inplace": "leaky_", "frozen_convert": "frozen_relu_"}


class Block(nn.Module):
    """Batch norm and activation between two convolutions."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 1, bias=False), nn.Conv2d(channels, 1, 1)
        self.norm, self.activation = nn.BatchNorm2d(channels), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.activation(self.norm(self.conv1(x))))


class ResidualBlock(Block):
    """The same, with an addition before the activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.activation(self.norm(self.conv1(x)) + x))


def saved_by_block(mode: Mode, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, float]:
    """Bytes saved for backward between the convolutions, as a multiple of one tensor of that shape."""
    x = torch.randn(shape, device=device, dtype=dtype)
    result = {}
    for name, block in (("alone", Block), ("of a sum", ResidualBlock)):
        model = mode.change(block(shape[1], mode.activation()).to(device, dtype))
        result[name] = bytes_saved_for_backward(model, x) / x.nbytes - 1  # the first convolution's input
    return result


@dataclasses.dataclass(frozen=True)
class Step:
    """Memory of one training step of ResNet-50."""

    mode: str
    batch: int
    kept_bytes: int  # saved for backward
    peak_bytes: int


def measure_step(name: str, batch: int, side: int, device: str, threads: int) -> Step:
    """Runs one step and measures its memory. In a new process, so that the peak of the process is that of the step."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    mode = MODES[name]
    model, x = mode.change(resnet50(mode.activation)).to(device), images(batch, device, side)
    before = _peak_start(device)
    model(x).square().mean().backward()
    peak = _peak(device) - before
    return Step(name, batch, bytes_saved_for_backward(model, x), peak)


def _run_in_process(function: Callable[..., Step], *arguments: Any) -> Step:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def _peak_start(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")  # getrusage would report the peak of the parent process if that is higher


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, f"/proc/self/status has no {field}"
    return int(match[1]) * 1024


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.render:
        write(arguments.render)
        return 0
    if normfused.info()["extension"] != "loaded":
        reason = normfused.info()["fallback_reason"]
        print(f"the benchmarks need the extension, which is not loaded: {reason}", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    description = machine.describe(arguments.device)
    folder: Path = arguments.out or Path(__file__).parent / "results" / machine.slug(description)
    folder.mkdir(parents=True, exist_ok=True)
    results = {"machine": description, **_measure(arguments)}
    (folder / "memory.json").write_text(json.dumps(results, indent=1) + "\n")
    write(folder)
    print(f"\nwritten to {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32, help="batch size of ResNet-50 (default: 32)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--tiny", action="store_true", help="rehearsal: two modes, small images; figures mean nothing")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/<device>)")
    parser.add_argument("--render", type=Path, metavar="DIR", help="measure nothing: render DIR/memory.json")
    return parser


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The lists "layers" and "resnet50" of memory.json."""
    device = arguments.device
    names, shapes, batch, side = list(MODES), RESNET50, arguments.batch, 224
    run: Callable[..., Step] = functools.partial(_run_in_process, measure_step)
    if arguments.tiny:
        names, shapes, batch, side, run = ["relu_", "convert"], ((8, 4),), 2, 32, measure_step
    layers = []
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            saved = [saved_by_block(MODES[name], (4, c, s, s), dtype, device) for c, s in shapes]
            layers.append({"mode": name, "dtype": str(dtype).removeprefix("torch."), "kept": saved})
    # malloc returns freed blocks of this size to the system, so that resident memory is memory in use.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    steps = []
    for name in names:
        step = run(name, batch, side, device, arguments.threads)
        saved_mib, peak_mib = step.kept_bytes / 2**20, step.peak_bytes / 2**20
        print(f"{MODES[name].title}: {saved_mib:,.0f} MiB saved for backward, peak {peak_mib:,.0f} MiB")
        steps.append(dataclasses.asdict(step))
    return {"layers": layers, "resnet50": steps}


def write(folder: Path) -> None:
    """Writes memory.md and memory.svg from memory.json."""
    results = json.loads((folder / "memory.json").read_text())
    (folder / "memory.md").write_text(render(results))
    draw(results, folder / "memory.svg")


def render(results: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    machine_ = results["machine"]
    versions = f"normfused {machine_['normfused']} ({machine_['revision']}), torch {machine_['torch']}"
    parts = [
        f"# Memory of training: {machine_.get('gpu', machine_['cpu'])}",
        f"{versions}, {machine_['date']}",
        f"## ResNet-50, float32, batch {results['resnet50'][0]['batch']}, 224²: one step",
        "Saved for backward: without parameters and buffers. Peak: maximum memory in use minus memory in use before "
        "the step; it includes the parameters' gradients and the workspace of convolutions. Percentages: compared with "
        "the corresponding mode of torch.nn.",
        _render_steps(results["resnet50"]),
        "## Batch norm and activation",
        "Bytes saved for backward between two convolutions, as a multiple of one tensor of the shape: minimum and "
        "maximum over the nine shapes of ResNet-50. The output is one of these tensors: the second convolution saves "
        'it in every mode. Fractions are sign bits and statistics. "Of a sum": with an addition before the activation.',
        _render_layers(results["layers"]),
    ]
    return "\n\n".join(parts) + "\n"


def _render_steps(steps: list[dict[str, Any]]) -> str:
    of_mode = {step["mode"]: step for step in steps}
    rows = []
    for name, step in of_mode.items():
        base = of_mode[BASES.get(name, name)]
        cells = []
        for key in ("kept_bytes", "peak_bytes"):
            change = f"{step[key] / base[key] - 1:+.0%}" if name in BASES else ""
            cells += [f"{step[key] / 2**20:,.0f}", change]
        rows.append((MODES[name].title, *cells))
    return tables.table(("mode", "saved for backward, MiB", "", "peak, MiB", ""), rows)


def _render_layers(layers: list[dict[str, Any]]) -> str:
    columns = [(dtype, kind) for dtype in ("float32", "bfloat16") for kind in ("alone", "of a sum")]
    saved = {(row["mode"], row["dtype"]): row["kept"] for row in layers}
    rows = []
    for name in dict.fromkeys(row["mode"] for row in layers):
        cells = []
        for dtype, kind in columns:
            multiples = [by_kind[kind] for by_kind in saved[name, dtype]]
            cells.append(_range(min(multiples), max(multiples)))
        rows.append((MODES[name].title, *cells))
    return tables.table(("mode", *(f"{dtype}, {kind}" for dtype, kind in columns)), rows)


def _range(low: float, high: float) -> str:
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}–{high:.2f}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws saved bytes and peak of ResNet-50 as bars."""
    steps = results["resnet50"]
    modes = [
        plots.Bars(MODES[step["mode"]].title, step["mode"] in BASES, step["kept_bytes"], step["peak_bytes"])
        for step in steps
    ]
    what = f"Memory of a training step: ResNet-50, float32, batch {steps[0]['batch']}, 224²"
    plots.draw_memory(results["machine"], what, modes, path)


if __name__ == "__main__":
    sys.exit(main())
