"""Writes results/plans.md: which launches the CUDA kernels make for well-known networks, and the bytes they move.

The table is computed from the kernels' plans by ``normfused.explain``. Nothing is measured, and no GPU is needed:

    python benchmarks/plan_table.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from cases import dtype_name
from norms import NORMS, lay_out
from public_rows import ROWS, NormCase
from resnet50 import resnet50
from tables import table
from torch import Tensor, nn

import normfused
from normfused.cuda_plans import CudaPass

RESULT = Path(__file__).parent / "results/plans.md"
DEVICES = ("h100", "h200", "a100", "l4", "t4")
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("channels first", "channels last")
# The words of the tables for the paths of `explain`.
WORDS = {
    "held in registers": "registers",
    "held in shared memory": "shared",
    "held in shared memory in part": "part shared",
    "read again from the L2 cache": "L2",
    "read again from the caches": "caches",
    "reduction, then application": "memory",
}
CELL = (
    "Forward; backward: the launches, the path and the bytes. The paths are "
    + ", ".join(f"`{word}` ({path})" for path, word in WORDS.items())
    + "."
)
Shape = tuple[int, ...]


def batch_norms_of_resnet50() -> Counter[Shape]:
    """The shapes of one image at the 53 batch norms, and how many have each."""
    shapes: Counter[Shape] = Counter()
    model = resnet50(nn.ReLU).to("meta")
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda _layer, inputs, _output: shapes.update([tuple(inputs[0].shape[1:])]))
    model(torch.empty(2, 3, 224, 224, device="meta"))
    return shapes


def empty(shape: Sequence[int], dtype: torch.dtype, layout: str) -> Tensor:
    return lay_out(torch.empty(*shape, dtype=dtype, device="meta"), layout)


def passes(layer: nn.Module, x: Tensor, device: str) -> tuple[CudaPass, ...]:
    return normfused.explain(layer, x, device=device).passes


def relative(steps: Iterable[CudaPass]) -> str:
    """Bytes moved, relative to each tensor moved once."""
    steps = list(steps)
    return f"{sum(s.read_bytes + s.written_bytes for s in steps) / sum(s.floor_bytes for s in steps):.2f}"


def sums_over_resnet50(shapes: Counter[Shape]) -> str:
    """One row for each batch size, dtype and layout; for each device the launches and the bytes."""
    rows = []
    for batch in (32, 256):
        for dtype in DTYPES:
            for layout in LAYOUTS:
                row = [str(batch), dtype_name(dtype), layout]
                for device in DEVICES:
                    steps = [
                        step
                        for shape, count in shapes.items()
                        for step in passes(nn.BatchNorm2d(shape[0]), empty((batch, *shape), dtype, layout), device)
                        * count
                    ]
                    row.append(f"{sum(step.launches for step in steps)}, {relative(steps)}")
                rows.append(row)
    return table(("batch", "dtype", "layout", *DEVICES), rows, text_columns=3)


def cell(steps: Iterable[CudaPass]) -> str:
    """Launches, path and bytes of each pass."""
    return "; ".join(f"{step.launches} {WORDS[step.path]} {relative([step])}" for step in steps)


def layers_of_resnet50(shapes: Counter[Shape], batch: int, dtype: torch.dtype) -> str:
    rows = []
    for shape, count in shapes.items():
        for layout in LAYOUTS:
            layer, x = nn.BatchNorm2d(shape[0]), empty((batch, *shape), dtype, layout)
            cells = [cell(passes(layer, x, device)) for device in DEVICES]
            rows.append((str(count), "×".join(map(str, shape)), layout, *cells))
    return table(("layers", "shape", "layout", *DEVICES), rows, text_columns=3)


def reasons_for_resnet50(shapes: Counter[Shape]) -> str:
    rows = []
    for shape in shapes:
        for layout in LAYOUTS:
            steps = passes(nn.BatchNorm2d(shape[0]), empty((256, *shape), torch.bfloat16, layout), "h100")
            reasons = [f"{step.path} ({step.reason})" for step in steps]
            rows.append(("×".join(map(str, shape)), layout, *reasons))
    return table(("shape", "layout", "forward", "backward"), rows, text_columns=4)


def norms_of_samples() -> str:
    """The shapes of the benchmarks of group and instance norm, and of published figures."""
    chosen = ("GroupNorm + SiLU", "InstanceNorm2d", "InstanceNorm3d", "LayerNorm", "LayerNorm2d")
    cases = [
        (name, NORMS[name], shape, dtype) for name in chosen for shape in NORMS[name].shapes for dtype in DTYPES
    ] + [
        (row.what.rsplit(" [", 1)[0].rsplit(",", 1)[0], row.case.norm, row.case.shape, row.case.dtype)
        for row in ROWS
        if isinstance(row.case, NormCase)
    ]
    rows = []
    for name, norm, shape, dtype in cases:
        for layout in norm.layouts():
            layer, x = norm.ours(norm.channels(shape)), empty(shape, dtype, layout)
            cells = [cell(passes(layer, x, device)) for device in DEVICES]
            rows.append((name, "×".join(map(str, shape)), dtype_name(dtype), layout, *cells))
    return table(("norm", "shape", "dtype", "layout", *DEVICES), rows, text_columns=4)


def render() -> str:
    shapes = batch_norms_of_resnet50()
    return "\n\n".join(
        (
            "# Plans of the CUDA kernels",
            "Computed by `normfused.explain`, **not yet run on a GPU**. Bytes are those that the launches move, "
            "relative to each tensor moved once: forward reads one and writes one, backward reads two and writes one.",
            "## ResNet-50: all 53 batch norms, forward and backward",
            "Launches and bytes for each device.",
            sums_over_resnet50(shapes),
            "## Each batch norm of ResNet-50",
            f"{CELL} `layers` is how many batch norms have the shape of an image.",
            *(
                text
                for batch in (32, 256)
                for dtype in DTYPES
                for text in (f"### Batch {batch}, {dtype_name(dtype)}", layers_of_resnet50(shapes, batch, dtype))
            ),
            "## Reasons: ResNet-50, batch 256, bfloat16, H100",
            reasons_for_resnet50(shapes),
            "## Norms of one sample",
            CELL,
            norms_of_samples(),
        )
    ) + "\n"  # fmt: skip


if __name__ == "__main__":
    RESULT.write_text(render())
