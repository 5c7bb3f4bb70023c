"""Shows the CUDA launches of ResNet-50's batch norms, their memory traffic, and their predicted times on an H100.

The plans come from the sources of this checkout and of another revision, compiled for the host. The times are
predictions of a model, not measurements: they rank the losses, and so what to measure first on a GPU.

    python benchmarks/cuda_plans.py --against main
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
BATCH_NORMS = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]

PRINTER = r"""
#include <cstdio>
#include "kernels/cuda/traffic.h"
using namespace normfused;
using namespace normfused::cuda;
template <class R> int group_of(const R& r) {
  if constexpr (requires { r.group; }) return r.group;
  return r.splits();
}
template <class L> Traffic traffic_of(Operation operation, const ChannelView& view, int itemsize, L limits) {
  if constexpr (requires { limits.shared_bytes; }) limits.shared_bytes = 227 << 10;  // that of an H100
  if constexpr (requires { traffic(operation, view, itemsize, false, limits); })
    return traffic(operation, view, itemsize, false, limits);
  else
    return traffic(operation, view, itemsize, limits);
}
template <class T> bool one_launch(const T& t) {  // reduces and applies
  if constexpr (requires { t.persistent; }) return t.single || t.pipelined || t.persistent;
  if constexpr (requires { t.pipelined; }) return t.single || t.pipelined;
  return t.single;
}
int main() {
  int channels, side, batch, itemsize, last, backward, multiprocessors;
  long long l2;
  while (std::scanf("%d %d %d %d %d %d %d %lld", &channels, &side, &batch, &itemsize, &last, &backward,
                    &multiprocessors, &l2) == 8) {
    const int64_t pixels = int64_t{side} * side;
    const ChannelView view = last ? ChannelView{batch * pixels, channels, 1} : ChannelView{batch, channels, pixels};
    const auto operation = backward ? Operation::kBackward : Operation::kTraining;
    const Traffic t = traffic_of(operation, view, itemsize, DeviceLimits{multiprocessors, l2});
    const ReductionPlan& r = t.reduction;
    const int64_t chunk = r.by_rows ? r.rows.chunk : r.columns.chunk;
    const int step = r.by_rows ? r.rows.lanes : r.columns.height;
    std::printf("{\"one_launch\": %d, \"launches\": %d, \"read\": %lld, \"written\": %lld, "
                "\"by_rows\": %d, \"masked\": %d, \"tiles\": %lld, \"splits\": %d, "
                "\"group\": %d, \"width\": %d, \"vectors\": %g, \"flat\": %d}\n",
                one_launch(t), t.launches, static_cast<long long>(t.read), static_cast<long long>(t.written), r.by_rows,
                r.by_rows && r.rows.masked, static_cast<long long>(r.tiles()), r.splits(), group_of(r),
                r.by_rows ? 0 : r.columns.width * r.columns.values, static_cast<double>(chunk) / step, t.apply.by_rows);
  }
}
"""


class Device(NamedTuple):
    """Sizes in bytes, bandwidths in bytes per microsecond, latencies in microseconds."""

    name: str = "H100"
    multiprocessors: int = 132
    l2_bytes: int = 50 << 20
    read: float = 3.1e6
    mixed: float = 3.0e6  # reading and writing
    from_l2: float = 5.5e6
    cached: float = 28e6  # bytes of a pass that the next pass, in reverse order, finds in L2
    latency: float = 0.7  # of one iteration of loads, including its arithmetic


class Kernels(NamedTuple):
    """Properties of a revision's machine code and launches, as tests/cuda_build reads them."""

    flat_in_flight: int  # loads of a thread in flight in apply_flat, 16-bit data
    wide_stores: bool  # a plain store of 16 bytes is one instruction
    predicated_tail: bool  # the tail of a thread's vectors is one iteration
    finish: float  # microseconds of the dependent loads after the merge
    gap: float  # microseconds between two dependent launches


BEFORE = Kernels(flat_in_flight=1, wide_stores=False, predicated_tail=False, finish=3.5, gap=1.0)
NOW = Kernels(flat_in_flight=4, wide_stores=True, predicated_tail=True, finish=2.5, gap=0.3)
RESIDENT = 2  # blocks of a reduction per multiprocessor, limited by registers
LAUNCH = 2.0  # microseconds to start and end a launch in a stream
MASKED = 2.0  # factor on the iterations of masked rows


class Case(NamedTuple):
    channels: int
    side: int
    batch: int
    itemsize: int
    last: bool
    backward: bool

    def tensor_bytes(self) -> int:
        return self.batch * self.channels * self.side**2 * self.itemsize


def plans(cases: Sequence[Case], device: Device, csrc: Path) -> list[dict[str, Any]]:
    """Compiles the planner of these sources and runs it for each case."""
    with tempfile.TemporaryDirectory() as folder:
        printer = Path(folder, "printer.cpp")
        printer.write_text(PRINTER)
        sources = [csrc / "kernels/cuda/plan.cpp", csrc / "kernels/cuda/traffic.cpp"]
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, "-std=c++20", "-O1", f"-I{csrc}", printer, *sources, "-o", Path(folder, "printer")]
        subprocess.run(command, check=True)
        lines = "".join(
            " ".join(str(int(value)) for value in (*case, device.multiprocessors, device.l2_bytes)) + "\n"
            for case in cases
        )
        done = subprocess.run([Path(folder, "printer")], input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def sources_at(revision: str, folder: Path) -> Path:
    """Extracts csrc of a git revision. Returns its path."""
    archive = subprocess.run(["git", "archive", revision, "csrc"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "csrc"


def predict(case: Case, plan: dict[str, Any], kernels: Kernels, device: Device) -> float:
    """Predicted microseconds: the maximum of bandwidth and latency in each pass, plus what happens in between."""
    inputs, size = (2 if case.backward else 1), case.tensor_bytes()
    in_flight = 4 // inputs if plan["by_rows"] else 8 // inputs
    tail = plan["vectors"] % in_flight
    iterations = plan["vectors"] // in_flight + (tail > 0 if kernels.predicated_tail else tail)
    if plan["masked"]:
        iterations *= MASKED
    waves = plan["tiles"] * plan["splits"] / (device.multiprocessors * RESIDENT)
    empty = 1 - waves / math.ceil(waves) if waves > 1 else 0.0
    by_bandwidth = inputs * size / device.read * (1 + 0.2 * empty / math.ceil(waves))
    reduction = max(by_bandwidth, iterations * device.latency * math.ceil(waves))
    if plan["one_launch"]:
        return LAUNCH + reduction + kernels.finish + size / device.mixed + 0.8
    between = _merge(case, plan) + kernels.finish + kernels.gap
    return LAUNCH + reduction + between + _application(case, plan, kernels, device)


def _merge(case: Case, plan: dict[str, Any]) -> float:
    """Predicted microseconds of the merge: of `group` splits, then of the groups, 64 bytes per clock from L2."""
    if plan["splits"] == 1:
        return 0.0
    levels = [plan["group"], math.ceil(plan["splits"] / plan["group"])]
    channels = 1 if plan["by_rows"] else plan["width"] // (1 if case.last else case.side**2)
    lanes = max(256 // channels, 1)
    return sum(max(n * channels * 16 / (64 * 1.755e3), math.ceil(n / lanes / 4) * 0.3) for n in levels if n > 1)


def _application(case: Case, plan: dict[str, Any], kernels: Kernels, device: Device) -> float:
    inputs, size = (2 if case.backward else 1), case.tensor_bytes()
    hit = min(device.cached, inputs * size)
    narrow = plan["flat"] and case.itemsize == 2 and kernels.flat_in_flight < 4
    efficiency = (0.77 if inputs == 2 else 0.90) if narrow else 0.95
    moved = (inputs * size - hit + size) / device.mixed / efficiency + 0.3 * hit / device.from_l2
    if size > device.l2_bytes / 2:
        return moved + 1.0
    split_stores = plan["flat"] and not kernels.wide_stores
    written = size / (1.6e6 if split_stores else 3.0e6)
    return max(inputs * size / device.from_l2 + 0.5 * written, written) / 0.9 + 1.0


def table(cases: Sequence[Case], before: list[dict[str, Any]], now: list[dict[str, Any]], device: Device) -> str:
    columns = ["blocks × splits before", "now", "merged by one block before", "now", "launches", "traffic, T"]
    columns += ["predicted µs before", "now", "floor"]
    lines = ["| shape | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for case, old, new in zip(cases, before, now, strict=True):
        size = case.tensor_bytes()
        traffic = " → ".join(f"{(p['read'] + p['written']) / size:.2f}" for p in (old, new))
        merged = [max(p["group"], math.ceil(p["splits"] / p["group"])) for p in (old, new)]
        times = [f"{predict(case, p, k, device):.1f}" for p, k in ((old, BEFORE), (new, NOW))]
        floor = (3 if case.backward else 2) * size / device.mixed
        cells = [
            f"{case.channels}×{case.side}²",
            *(f"{p['tiles']} × {p['splits']}{_path(p)}" for p in (old, new)),
            *map(str, merged),
            f"{old['launches']} → {new['launches']}",
            traffic,
            *times,
            f"{floor:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _path(plan: dict[str, Any]) -> str:
    return " one launch" if plan["one_launch"] else " masked" if plan["masked"] else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="main", help="git revision to compare with (default: main)")
    revision = parser.parse_args().against
    device = Device()
    print(f"Predictions of a model of the {device.name}, not measurements. T: size of the tensor in bytes.")
    with tempfile.TemporaryDirectory() as folder:
        old = sources_at(revision, Path(folder))
        for batch in (256, 32):
            for itemsize in (2, 4):
                for last in (False, True):
                    for backward in (False, True):
                        cases = [Case(c, side, batch, itemsize, last, backward) for c, side in BATCH_NORMS]
                        title = f"{'bf16' if itemsize == 2 else 'fp32'}, {'channels last' if last else 'contiguous'}"
                        print(f"\n## batch {batch}, {title}, {'backward' if backward else 'forward'}\n")
                        print(table(cases, plans(cases, device, old), plans(cases, device, ROOT / "csrc"), device))


if __name__ == "__main__":
    main()
