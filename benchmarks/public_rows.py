"""Compares published figures with the same cases measured here: ``python benchmarks/public_rows.py``.

Measures the rows that have a shape on a GPU and writes public.json to results/<device>/. ``--render`` writes
results/public.md from all such files; cells without a measurement say "not run".
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import command
import machine
import tables
import torch
from cases import WRONG, Case, build_calls
from measure import Measurement, complaint, measure, summarize
from norms import NORMS, Norm, calls
from proof import observe
from timing import FULL, TINY, Budget, interleave, make_stopwatch, samplers
from torch import Tensor, nn

import normfused

RESULTS = Path(__file__).parent / "results"
TILEOPS = "[TileOPs #2056](https://github.com/tile-ai/TileOPs/pull/2056)"
KERNELBENCH = "[KernelBench](https://github.com/ScalingIntelligence/KernelBench/tree/main/results/timing), level 1"
CUDNN = "[cudnn-frontend](https://github.com/NVIDIA/cudnn-frontend), benchmark/norms"
SGLANG = "[sglang #{0}](https://github.com/sgl-project/sglang/pull/{0})"
NO_SHAPE = "the source gives no shape"


@dataclass(frozen=True)
class NormCase:
    """Forward of a norm of samples, channels first."""

    norm: Norm
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class PublicRow:
    """A published figure: seconds, or text if the source gives GB/s."""

    source: str
    device: str
    what: str
    published: dict[str, float | str]  # implementation to figure
    case: Case | NormCase | None = None  # None: the source gives no shape
    note: str = ""


def _forward(dtype: torch.dtype, *shape: int) -> Case:
    return Case("training_forward", shape, dtype, "NCHW")


def _tileops(name: str, theirs: float, compiled: float, *shape: int) -> PublicRow:
    published: dict[str, float | str] = {"TileOPs": theirs * 1e-6, "torch.compile": compiled * 1e-6}
    what = f"batch norm, training forward, fp16 {list(shape)} ({name})"
    note = "the published time is the busy time of the kernels, by CUPTI"
    return PublicRow(TILEOPS, "H200", what, published, _forward(torch.float16, *shape), note)


def _kernelbench(what: str, eager: float, compiled: float, case: Case | NormCase | None = None) -> PublicRow:
    return PublicRow(KERNELBENCH, "H100", what, {"eager": eager * 1e-3, "torch.compile": compiled * 1e-3}, case)


def _sglang(number: int, device: str, microseconds: float, *shape: int) -> PublicRow:
    what = f"GroupNorm + SiLU, bf16 {list(shape)}"
    case = NormCase(NORMS["GroupNorm + SiLU"], shape, torch.bfloat16)
    return PublicRow(SGLANG.format(number), device, what, {"sglang": microseconds * 1e-6}, case)


def _cudnn(what: str, cudnn: int, compiled: int, eager: int) -> PublicRow:
    published: dict[str, float | str] = {
        name: f"{rate} GB/s" for name, rate in (("cuDNN", cudnn), ("torch.compile", compiled), ("eager", eager))
    }
    return PublicRow(CUDNN, "H200", f"{what}, bf16, median", published)


GROUPS_OF_8 = Norm(
    lambda channels: normfused.GroupNorm(8, channels), lambda channels: nn.GroupNorm(8, channels), (), target=1
)
ROWS = (
    _tileops("large-spatial", 911.65, 1017.73, 4, 128, 1024, 1024),
    _tileops("resnet50-stage1", 2.81, 4.10, 8, 64, 32, 32),
    _tileops("resnet50-stage2", 2.56, 3.49, 4, 128, 32, 32),
    _tileops("resnet50-stage3", 3.62, 4.80, 4, 256, 28, 28),
    _tileops("resnet50-fc", 1.79, 1.82, 32, 64),
    _kernelbench(
        "batch norm, training forward, fp32 [64, 64, 512, 512]", 8.77, 4.38, _forward(torch.float32, 64, 64, 512, 512)
    ),
    PublicRow(
        "torch native, few channels",
        "H20",
        "batch norm, backward, fp16 [20, 6, 65536]",
        {"torch": 1.895e-3},
        Case("training_backward", (20, 6, 65536), torch.float16, "NCHW"),
    ),
    _kernelbench(
        "InstanceNorm, fp32 [112, 64, 512, 512]",
        9.61,
        7.60,
        NormCase(NORMS["InstanceNorm2d"], (112, 64, 512, 512), torch.float32),
    ),
    _kernelbench(
        "GroupNorm(8), fp32 [112, 64, 512, 512]", 10.1, 8.22, NormCase(GROUPS_OF_8, (112, 64, 512, 512), torch.float32)
    ),
    _kernelbench("RMSNorm over channels, fp32", 14.2, 7.84),
    _kernelbench(
        "LayerNorm over [64, 256, 256], fp32 [16, 64, 256, 256]",
        8.12,
        0.46,
        NormCase(NORMS["LayerNorm"], (16, 64 * 256 * 256), torch.float32),
    ),
    _cudnn("RMSNorm, forward", 3407, 3577, 2697),
    _cudnn("RMSNorm, backward", 3183, 1703, 1494),
    _cudnn("LayerNorm, forward", 3227, 2552, 1644),
    _sglang(23938, "H200", 259.66, 1, 128, 20, 256, 256),
    _sglang(26045, "H100", 70.05, 1, 512, 8, 45, 80),
    _sglang(26045, "H100", 261.87, 1, 512, 16, 90, 160),
    _sglang(26045, "H100", 987.5, 1, 512, 16, 180, 320),
)


def shrunk(case: Case | NormCase) -> Case | NormCase:
    """The case with few values per dimension, for a rehearsal: 32 channels of group norm, else at most six."""
    most = [6] * len(case.shape)
    if isinstance(case, NormCase):
        most[1] = 32
    return replace(case, shape=tuple(map(min, case.shape, most)))


def busy_seconds(call: Callable[[], Any], times: int = 5) -> float:
    """The time that the kernels of a call keep the device busy, by CUPTI: median of several calls, with a warm L2."""
    return statistics.median(observe(call).busy_seconds for _ in range(times))


def measure_rows(device: str, *, tiny: bool = False, progress: Callable[[list[dict[str, Any]]], None]) -> int:
    """Measures the rows with a shape. Returns the number of failures.

    `progress` receives all rows so far after each row.
    """
    rows: list[dict[str, Any]] = []
    budget = TINY if tiny else FULL
    for row in ROWS:
        if row.case is None:
            continue
        case = shrunk(row.case) if tiny else row.case
        try:
            if isinstance(case, NormCase):
                found = _measure_norm(case, device, budget)
            else:
                found = _measure(case, device, budget, measure(case, device, budget, profile=device == "cuda"))
        except Exception as error:  # for example too large for the device
            found = {"failure": f"{type(error).__name__}: {error}".splitlines()[0]}
        rows.append({"what": row.what, "source": row.source, **found})
        progress(rows)
        print(f"{row.what}: {found.get('failure', 'measured')}", flush=True)
    return sum("failure" in row for row in rows)


def _measure(case: Case, device: str, budget: Budget, measured: Measurement) -> dict[str, Any]:
    found: dict[str, Any] = {"result": summarize(case, measured, device)}
    if wrong := complaint(case, measured):
        found["failure"] = wrong
    if device == "cuda":
        calls = build_calls(case, device)
        found["busy_seconds"] = {peer: busy_seconds(calls[peer]) for peer in ("normfused", "torch")}
    return found


def _largest_error(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the largest value. In the tensors' own dtype: copies in float64 would not fit the device."""
    return ((ours - theirs).abs_().max() / theirs.abs().max()).item()


def _measure_norm(case: NormCase, device: str, budget: Budget) -> dict[str, Any]:
    x = torch.randn(case.shape, device=device, dtype=case.dtype)
    peers = calls(case.norm, x, x, x)["forward"]  # which reads neither a residual nor a gradient
    error = _largest_error(peers["normfused"]()[0], peers["torch"]()[0])
    samples = interleave(samplers(peers, make_stopwatch(device)), budget)
    seconds = {peer: {"median": statistics.median(times)} for peer, times in samples.items()}
    found: dict[str, Any] = {"result": {"seconds": seconds, "error": {"normfused": error}}}
    if error > WRONG[case.dtype]:
        found["failure"] = f"relative error {error:.1e} against torch"
    if device == "cuda":
        found["busy_seconds"] = {peer: busy_seconds(peers[peer]) for peer in ("normfused", "torch")}
    return found


def collect(folder: Path) -> list[dict[str, Any]]:
    """The public.json of every device folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/public.json"))]


def render(runs: Sequence[dict[str, Any]]) -> str:
    """The page with all rows and the figures of each run."""
    busy = "busy time: normfused, torch"
    header = ("source", "case", "published on", "published", "measured on", "normfused", "torch", busy)
    lines = [line for row in ROWS for line in _lines(row, runs)]
    parts = [
        "# Published figures and the same cases measured here",
        "Published figures are copied from their sources. Figures measured here are medians of device time between two "
        "events, with a cold L2, and the busy time of the kernels, with a warm L2, which some sources publish. Figures "
        "of different devices cannot be compared.",
        tables.table(header, lines, text_columns=5),
        *dict.fromkeys(f"{row.source}: {row.note}." for row in ROWS if row.note),
        *(f"{run['machine']['gpu']}: {command.versions(run['machine'])}" for run in runs),
    ]
    return "\n\n".join(parts) + "\n"


def _lines(row: PublicRow, runs: Sequence[dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    published = ", ".join(f"{whose} {_time(figure, 5)}" for whose, figure in row.published.items())
    start = (row.source, row.what, row.device, published)
    if row.case is None:
        yield (*start, "–", NO_SHAPE, "–", "–")
        return
    found = [(run["machine"]["gpu"], one) for run in runs for one in run["rows"] if one["what"] == row.what]
    if not found:
        yield (*start, "–", "not run", "not run", "not run")
    for gpu, one in found:
        if "failure" in one:
            yield (*start, gpu, f"failed: {one['failure']}".replace("|", "\\|"), "–", "–")
            continue
        seconds, busy = one["result"]["seconds"], one["busy_seconds"]
        figures = [_time(seconds[peer]["median"]) for peer in ("normfused", "torch")]
        yield (*start, gpu, *figures, ", ".join(_time(busy[peer]) for peer in ("normfused", "torch")))


def _time(figure: float | str, digits: int = 3) -> str:
    if isinstance(figure, str):
        return figure
    return f"{figure * 1e3:.{digits}g} ms" if figure >= 1e-3 else f"{figure * 1e6:.{digits}g} µs"


def write_table() -> None:
    (RESULTS / "public.md").write_text(render(collect(RESULTS)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a rehearsal")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: results/<device>)")
    parser.add_argument("--render", action="store_true", help="measure nothing; write results/public.md")
    arguments = parser.parse_args()
    if arguments.render:
        write_table()
        return 0
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("the published figures are of GPUs: --device cpu needs --tiny")
    assert normfused.info()["extension"] == "loaded", normfused.info()["fallback_reason"]
    description = machine.describe(arguments.device)
    folder: Path = arguments.out or RESULTS / machine.slug(description)
    folder.mkdir(parents=True, exist_ok=True)

    def save(rows: list[dict[str, Any]]) -> None:
        (folder / "public.json").write_text(json.dumps({"machine": description, "rows": rows}, indent=1) + "\n")

    failures = measure_rows(arguments.device, tiny=arguments.tiny, progress=save)
    cases = sum(row.case is not None for row in ROWS)
    print(f"{cases - failures} of {cases} published cases measured; {len(ROWS) - cases} others: {NO_SHAPE}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
