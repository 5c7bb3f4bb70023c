"""The CUDA kernels, run on the CPU: right in any order of their threads, within bounds, without a race."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from host_build import ADDRESS, HERE, KERNELS, LAUNCHERS, PLAIN, ROOT, THREAD, build, clang, gcc, run

EVERYTHING = [HERE / "main.cpp", *LAUNCHERS]
BARRIERS = [HERE / "barriers.cpp", KERNELS / "plan.cpp"]
BARRIER = re.compile(r"(__syncthreads|__threadfence|(?<!void )wait_for_previous_launch)\(\)")


def test_kernels_match_their_definition_in_three_orders(
    cache: Path, record_property: Callable[[str, str], None]
) -> None:
    program = build(cache, gcc(), PLAIN, EVERYTHING)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = list(
            pool.map(lambda task: run(program, task[0], order=task[1]), [("full", 0), ("small", 1), ("small", 7)])
        )
    for done in runs:
        assert done.returncode == 0, done.stdout + done.stderr
    record_property("table", "".join(done.stdout for done in runs))


def test_kernels_stay_in_bounds(cache: Path) -> None:
    done = run(build(cache, gcc(), ADDRESS, EVERYTHING), "small")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("order", [0, 1, 7])
def test_kernels_have_no_race(cache: Path, order: int) -> None:
    done = run(build(cache, clang(), THREAD, BARRIERS), order=order)
    assert done.returncode == 0, done.stdout + done.stderr


def changed(tmp_path: Path, file: str, change: dict[str, str]) -> Path:
    """The sources with some text replaced; each must be there once."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    path = csrc / "kernels/cuda" / file
    text = path.read_text()
    for old, new in change.items():
        assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    path.write_text(text)
    return csrc


def sites() -> list[tuple[str, int]]:
    """Every barrier and fence of the kernels: file and line."""
    return [
        (path.name, number)
        for path in sorted(KERNELS.glob("*.cuh"))
        for number, line in enumerate(path.read_text().splitlines())
        if BARRIER.search(line)
    ]


def test_every_barrier_and_fence_is_needed(cache: Path, tmp_path: Path) -> None:
    """With any one of them removed, ThreadSanitizer, the simulator or the result tells."""
    compiler = clang()

    def survives(site: tuple[str, int]) -> bool:
        file, number = site
        folder = tmp_path / f"{file}-{number}"
        shutil.copytree(ROOT / "csrc", folder)
        path = folder / "kernels/cuda" / file
        lines = path.read_text().splitlines()
        lines[number] = BARRIER.sub("(void)0", lines[number])
        path.write_text("\n".join(lines))
        sources = [BARRIERS[0], folder / "kernels/cuda/plan.cpp"]
        return run(build(folder, compiler, THREAD, sources, csrc=folder)).returncode == 0

    found = sites()
    assert len(found) > 10
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        survivors = [
            f"{file}:{number + 1}"
            for (file, number), alive in zip(found, pool.map(survives, found), strict=True)
            if alive
        ]
    assert survivors == []


WAIT = "  wait_for_previous_launch();\n"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            {f"{WAIT}  op.prologue();\n  const int64_t": f"  op.prologue();\n{WAIT}  const int64_t"}, id="counter"
        ),
        pytest.param(
            {
                f"{WAIT}  op.prologue();\n  const unsigned": "  op.prologue();\n  const unsigned",
                "block / tiles, streaming);\n": f"block / tiles, streaming);\n{WAIT}",
            },
            id="coefficients",
        ),
    ],
)
def test_waiting_late_for_the_launch_before_is_a_race(tmp_path: Path, change: dict[str, str]) -> None:
    csrc = changed(tmp_path, "apply.cuh", change)
    done = run(build(tmp_path, clang(), THREAD, [BARRIERS[0], csrc / "kernels/cuda/plan.cpp"], csrc=csrc))
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        pytest.param(
            "walk.cuh",
            {"(outer_ * plan_.view.channels + channel_)": "((outer_ + 1) * plan_.view.channels + channel_)"},
            r"FAILED statistics of \d+ x \d+ x \d+: \w+\[\d+\] is",
            id="off by one row",
        ),
        pytest.param(
            "reduce.cuh",
            {"  if (walk.has(1)) take(std::false_type{});\n  return state;\n": "  return state;\n"},
            r"FAILED statistics of \d+ x \d+ x \d+: \w+\[\d+\] is",
            id="lost tail",
        ),
        pytest.param(
            "reduce.cuh",
            {
                "  join_lanes<Op>(sums, plan.lanes);": "  if (threadIdx.x < 9) __syncthreads();\n"
                "  join_lanes<Op>(sums, plan.lanes);"
            },
            r"FAILED statistics of .*: .*__syncthreads \[.*reduce.cuh:\d+\]|divergent barrier: .*reduce.cuh:\d+",
            id="divergent barrier",
        ),
    ],
)
def test_planted_faults_are_placed(tmp_path: Path, file: str, change: dict[str, str], message: str) -> None:
    csrc = changed(tmp_path, file, change)
    done = run(build(tmp_path, gcc(), "-O1", [BARRIERS[0], csrc / "kernels/cuda/plan.cpp"], csrc=csrc))
    assert done.returncode != 0
    assert re.search(message, done.stdout), done.stdout


def test_approximations_are_within_half_a_unit(cache: Path, record_property: Callable[[str, str], None]) -> None:
    done = run(build(cache, gcc(), PLAIN, [HERE / "approximations.cpp"]))
    assert done.returncode == 0, done.stdout
    record_property("table", done.stdout)


@pytest.mark.parametrize("flags", [ADDRESS, THREAD])
def test_launches_that_can_run_at_once_share_no_tickets(cache: Path, flags: str) -> None:
    done = run(build(cache, clang() if flags == THREAD else gcc(), flags, [HERE / "tickets.cpp"]))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("part", ["a.device, ", "a.stream, ", "a.thread, ", ", a.capture"])
def test_every_part_of_the_key_of_tickets_counts(tmp_path: Path, part: str) -> None:
    csrc = changed(tmp_path, "tickets.h", {part: "", part.replace("a.", "b."): ""})
    done = run(build(tmp_path, gcc(), "-O1", [HERE / "tickets.cpp"], csrc=csrc))
    assert "FAILED" in done.stdout


def test_build_is_not_repeated(cache: Path) -> None:
    first = build(cache, gcc(), PLAIN, [HERE / "faults.cpp"])
    stamp = first.stat().st_mtime_ns
    assert build(cache, gcc(), PLAIN, [HERE / "faults.cpp"]).stat().st_mtime_ns == stamp


def test_shared_memory_is_declared_for_both_compilers(tmp_path: Path) -> None:
    """A plain __shared__ would be a variable of each thread on the CPU; it does not compile."""
    source = tmp_path / "plain.cpp"
    source.write_text('#include "cuda_host.h"\n__global__ void kernel() { __shared__ int s; (void)s; }\n')
    with pytest.raises(subprocess.CalledProcessError):
        build(tmp_path, gcc(), PLAIN, [source])
