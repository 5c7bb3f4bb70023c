"""What training keeps in memory, by mode of batch norm: ``python benchmarks/memory.py``.

Writes memory.json, memory.md and memory.png to results/<device>/: for the nine shapes of the grid the bytes that batch
norm and what follows it keep for backward, and for a whole ResNet-50 the bytes kept and the peak of one step.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import matplotlib
import tables
import torch
from cases import RESNET50
from resnet50 import frozen, images, resnet50
from torch import Tensor, nn

import normfused
from normfused.conversion import bytes_saved_for_backward

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Mode:
    """How batch norms and activations of a model are computed; ``activation`` makes what follows them."""

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


# What each of our modes replaces.
BASES = {"convert": "relu_", "inplace": "leaky_", "frozen_convert": "frozen_relu_"}


class Block(nn.Module):
    """Batch norm, a sum if wanted, and an activation, between two convolutions."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.before, self.behind = nn.Conv2d(channels, channels, 1, bias=False), nn.Conv2d(channels, 1, 1)
        self.norm, self.activation = nn.BatchNorm2d(channels), activation


class Alone(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.activation(self.norm(self.before(x))))


class Added(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.activation(self.norm(self.before(x)) + x))


def layers_kept(mode: Mode, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, float]:
    """Tensors that are kept between the convolutions, in bytes over those of one tensor of that shape."""
    x = torch.randn(shape, device=device, dtype=dtype)
    result = {}
    for name, block in (("alone", Alone), ("of a sum", Added)):
        model = mode.change(block(shape[1], mode.activation()).to(device, dtype))
        result[name] = bytes_saved_for_backward(model, x) / x.nbytes - 1  # the first convolution's input
    return result


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step of ResNet-50: loss of its logits, backward."""

    mode: str
    batch: int
    kept_bytes: int
    peak_bytes: int


def measure_step(name: str, batch: int, side: int, device: str, threads: int) -> Step:
    """To be run in a process of its own, so that its peak is this step's."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    mode = MODES[name]
    model, x = mode.change(resnet50(mode.activation)).to(device), images(batch, device, side)
    before = _peak_start(device)
    model(x).square().mean().backward()
    peak = _peak(device) - before
    return Step(name, batch, bytes_saved_for_backward(model, x), peak)


def _run(here: bool, function: Callable[..., Step], *arguments: Any) -> Step:
    """In a process of its own, or here."""
    if here:
        return function(*arguments)
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
    return _status("VmHWM")  # not getrusage's, which starts at the parent's


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, f"the system does not tell {field}"
    return int(match[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32, help="images in the ResNet-50's batch; 32")
    parser.add_argument("--threads", type=int, default=2, help="2")
    parser.add_argument("--tiny", action="store_true", help="two modes, small images: no figures, a rehearsal")
    parser.add_argument("--out", type=Path, help="folder; benchmarks/results/<device>")
    arguments = parser.parse_args()
    if normfused.info()["extension"] != "loaded":
        print(
            f"nothing to measure, the extension is not loaded: {normfused.info()['fallback_reason']}", file=sys.stderr
        )
        return 1
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    description = machine.describe(device)
    folder: Path = arguments.out or Path(__file__).parent / "results" / machine.slug(description)
    folder.mkdir(parents=True, exist_ok=True)

    names, shapes, batch, side = list(MODES), RESNET50, arguments.batch, 224
    if arguments.tiny:
        names, shapes, batch, side = ["relu_", "convert"], ((8, 4),), 2, 32
    layers = []
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            kept = [layers_kept(MODES[name], (4, c, s, s), dtype, device) for c, s in shapes]
            layers.append({"mode": name, "dtype": str(dtype).removeprefix("torch."), "kept": kept})
    # malloc gives back what is freed, so that resident memory is what is in use.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    steps = []
    for name in names:
        step = _run(arguments.tiny, measure_step, name, batch, side, device, arguments.threads)
        print(f"{MODES[name].title}: {step.kept_bytes / 2**20:,.0f} MiB kept, peak {step.peak_bytes / 2**20:,.0f} MiB")
        steps.append(dataclasses.asdict(step))
    results = {"machine": description, "layers": layers, "resnet50": steps}
    (folder / "memory.json").write_text(json.dumps(results, indent=1) + "\n")
    write(folder)
    print(f"\nwritten to {folder}")
    return 0


def write(folder: Path) -> None:
    """memory.md and memory.png from memory.json."""
    results = json.loads((folder / "memory.json").read_text())
    (folder / "memory.md").write_text(render(results))
    draw(results, folder / "memory.png")


def render(results: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    machine_, steps = results["machine"], {step["mode"]: step for step in results["resnet50"]}
    batch = results["resnet50"][0]["batch"]
    rows = []
    modes = {name: mode for name, mode in MODES.items() if name in steps}
    for name, mode in modes.items():
        base = steps[BASES.get(name, name)]
        figures = [f"{steps[name][key] / 2**20:,.0f}" for key in ("kept_bytes", "peak_bytes")]
        shares = [
            f"{steps[name][key] / base[key] - 1:+.0%}" if name in BASES else "" for key in ("kept_bytes", "peak_bytes")
        ]
        rows.append((mode.title, figures[0], shares[0], figures[1], shares[1]))
    columns = [(dtype, kind) for dtype in ("float32", "bfloat16") for kind in ("alone", "of a sum")]
    layers = []
    for name, mode in modes.items():
        cells = []
        for dtype, kind in columns:
            (row,) = (r for r in results["layers"] if (r["mode"], r["dtype"]) == (name, dtype))
            tensors = [kept[kind] for kept in row["kept"]]
            cells.append(_range(min(tensors), max(tensors)))
        layers.append((mode.title, *cells))
    versions = f"normfused {machine_['normfused']} ({machine_['revision']}), torch {machine_['torch']}"
    parts = [
        f"# Memory of training: {machine_.get('gpu', machine_['cpu'])}",
        f"{versions}, {machine_['date']}",
        f"## ResNet-50, float32, batch {batch}, 224²: one step",
        "Kept: bytes that the forward pass keeps for backward, without parameters and buffers. Peak: memory in use at "
        "most, above that before the step; with the parameters' gradients and what convolutions need for themselves. "
        "Beside both: against the mode of torch.nn's that does the same.",
        tables.table(("mode", "kept, MiB", "", "peak, MiB", ""), rows),
        "## Batch norm and activation",
        "Between two convolutions: bytes kept, in tensors of the shape; least and most over the nine shapes of "
        "ResNet-50. The output is one of them, which the second convolution keeps in any mode. Beyond whole numbers: "
        "bits for the signs, statistics.",
        tables.table(("mode", *(f"{dtype}, {kind}" for dtype, kind in columns)), layers),
    ]
    return "\n\n".join(parts) + "\n"


def _range(low: float, high: float) -> str:
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}–{high:.2f}"


def draw(results: dict[str, Any], path: Path) -> None:
    """ResNet-50's figures as bars."""
    steps = results["resnet50"]
    fig, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    for index, step in enumerate(reversed(steps)):
        ours = step["mode"] in BASES
        for key, offset, color in (
            ("peak_bytes", -0.2, "#9cc3e6" if ours else "#d9d9d9"),
            ("kept_bytes", 0.2, "#1f5a99" if ours else "#7a7a7a"),
        ):
            value = step[key] / 2**30
            ax.barh(index + offset, value, 0.36, color=color)
            ax.annotate(
                f"{value:.2f}", (value, index + offset), (3, 0), textcoords="offset points", va="center", fontsize=8
            )
    ax.set_yticks(range(len(steps)), [MODES[step["mode"]].title for step in reversed(steps)])
    ax.set_xlabel("GiB: kept for backward (dark), peak of a step (light)")
    ax.spines[["top", "right"]].set_visible(False)
    where = results["machine"].get("gpu", results["machine"]["cpu"])
    ax.set_title(f"ResNet-50, float32, batch {steps[0]['batch']}, 224²; {where}", loc="left", fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    sys.exit(main())
