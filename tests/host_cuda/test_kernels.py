"""The CUDA kernels in the simulator: correct in any order of their threads, within bounds, and free of races."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from host_build import ADDRESS, HERE, KERNELS, LAUNCHERS, PLAIN, ROOT, THREAD, build, check_syntax, clang, gcc, run

EVERYTHING = [HERE / "main.cpp", *LAUNCHERS]
BARRIERS = [HERE / "barriers.cpp", KERNELS / "plan.cpp"]
BARRIER = re.compile(
    r"(__syncthreads|__threadfence|(?<!void )wait_for_previous_launch)\(\)|sync_blocks\((partials\.splits|chunks)\)"
)


def run_all(program: Path, tasks: list[tuple[str, int, int]]) -> str:
    """Runs main.cpp for each (size, order, resident blocks); returns what the runs print."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = list(pool.map(lambda task: run(program, task[0], order=task[1], resident=task[2]), tasks))
    for done in runs:
        assert done.returncode == 0, done.stdout + done.stderr
    return "".join(done.stdout for done in runs)


def test_kernels_match_their_definition(cache: Path, record_property: Callable[[str, str], None]) -> None:
    program = build(cache, gcc(), PLAIN, EVERYTHING)
    tasks = [("small", 7, 3), ("samples", 1, 1), ("clusters", 7, 2), ("pipelined", 7, 2), ("persistent", 7, 2)]
    record_property("table", run_all(program, tasks))


@pytest.mark.nightly
def test_kernels_match_their_definition_in_every_schedule(
    cache: Path, record_property: Callable[[str, str], None]
) -> None:
    """In three orders, with one block at a time, two, a random number, and as many as a small launch has."""
    program = build(cache, gcc(), PLAIN, EVERYTHING)
    tasks = [("full", 0, 1), *(("small", order, resident) for order in (0, 1, 7) for resident in (1, 2, 16))]
    tasks += [("samples", order, resident) for order, resident in ((0, 1), (1, 2), (7, 16))]
    tasks += [("single", 0, 1), ("clusters", 0, 1), ("clusters", 1, 2), ("clusters", 7, 2)]
    for size in ("pipelined", "persistent"):
        tasks += [(size, order, resident) for order, resident in ((0, 1), (1, 2), (7, 2))]
    record_property("table", run_all(program, tasks))


def test_kernels_stay_in_bounds(cache: Path) -> None:
    program = build(cache, gcc(), ADDRESS, EVERYTHING)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(
            lambda size: run(program, size), ["small", "samples", "clusters", "pipelined", "persistent"]
        ):
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("order", "resident"), [(0, 3), (1, 2), (7, 1)])
def test_kernels_have_no_race(cache: Path, order: int, resident: int) -> None:
    done = run(build(cache, clang(), THREAD, BARRIERS), order=order, resident=resident)
    assert done.returncode == 0, done.stdout + done.stderr


def mutate(folder: Path, file: str, change: dict[str, str]) -> Path:
    """Copies the sources and replaces some text of one kernel file. Each text must occur exactly once."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    path = csrc / "kernels/cuda" / file
    text = path.read_text()
    for old, new in change.items():
        assert text.count(old) == 1, f"{file} contains {old!r} {text.count(old)} times"
        text = text.replace(old, new)
    path.write_text(text)
    return csrc


def barrier_sites() -> list[tuple[str, int]]:
    """Every barrier, fence and launch wait of the kernels, as file and line index."""
    return [
        (path.name, number)
        for path in sorted(KERNELS.glob("*.cuh"))
        for number, line in enumerate(path.read_text().splitlines())
        if BARRIER.search(line)
    ]


@pytest.mark.nightly
def test_every_barrier_and_fence_is_needed(folder: Path) -> None:
    """Without any single one, ThreadSanitizer, the simulator or a wrong result reports an error."""
    compiler = clang()

    def survives(site: tuple[str, int]) -> bool:
        file, number = site
        csrc = folder / f"{file}-{number}"
        shutil.copytree(ROOT / "csrc", csrc)
        path = csrc / "kernels/cuda" / file
        lines = path.read_text().splitlines()
        lines[number] = BARRIER.sub("(void)0", lines[number])
        path.write_text("\n".join(lines))
        sources = [BARRIERS[0], csrc / "kernels/cuda/plan.cpp"]
        return run(build(csrc, compiler, THREAD, sources, csrc=csrc), resident=3).returncode == 0

    sites = barrier_sites()
    assert len(sites) > 10
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        survivors = [
            f"{file}:{number + 1}"
            for (file, number), alive in zip(sites, pool.map(survives, sites), strict=True)
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
                "chunks, NoStage{}, streaming);\n": f"chunks, NoStage{{}}, streaming);\n{WAIT}",
            },
            id="coefficients",
        ),
    ],
)
def test_waiting_late_for_the_previous_launch_is_a_race(folder: Path, change: dict[str, str]) -> None:
    csrc = mutate(folder, "apply.cuh", change)
    done = run(build(folder, clang(), THREAD, [BARRIERS[0], csrc / "kernels/cuda/plan.cpp"], csrc=csrc))
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        pytest.param(
            "iterators.cuh",
            {"(outer_ * plan_.view.channels + channel_)": "((outer_ + 1) * plan_.view.channels + channel_)"},
            r"FAILED statistics of \d+ x \d+ x \d+: \w+\[\d+\] is",
            id="off by one row",
        ),
        pytest.param(
            "reduce_phases.cuh",
            {"  if (!it.done()) consume(std::false_type{});\n  return state;\n": "  return state;\n"},
            r"FAILED statistics of \d+ x \d+ x \d+: \w+\[\d+\] is",
            id="lost tail",
        ),
        pytest.param(
            "reduce.cuh",
            {
                "  merge_lanes<Op>(sums, plan.lanes);": "  if (threadIdx.x < 9) __syncthreads();\n"
                "  merge_lanes<Op>(sums, plan.lanes);"
            },
            r"FAILED statistics of .*: .*__syncthreads \[.*reduce.cuh:\d+\]|divergent barrier: .*reduce.cuh:\d+",
            id="divergent barrier",
        ),
    ],
)
def test_the_report_of_a_fault_names_its_place(folder: Path, file: str, change: dict[str, str], message: str) -> None:
    csrc = mutate(folder, file, change)
    done = run(build(folder, gcc(), "-O1", [BARRIERS[0], csrc / "kernels/cuda/plan.cpp"], csrc=csrc))
    assert done.returncode != 0
    assert re.search(message, done.stdout), done.stdout


@pytest.mark.parametrize(
    ("file", "change"),
    [
        pytest.param("stage.cuh", {"wait_for_copies<kGroups - 1>": "wait_for_copies<kGroups>"}, id="first group"),
        pytest.param("stage.cuh", {"wait_for_copies<0>": "wait_for_copies<1>"}, id="last group"),
        pytest.param("stage.cuh", {"  end_copies();\n": ""}, id="groups never end"),
        pytest.param("stage.cuh", {"group_vectors_ < vectors)": "group_vectors_ + 1 < vectors)"}, id="one short"),
        pytest.param("reduce_phases.cuh", {"  stage.wait(first + kVectors);\n": ""}, id="no wait"),
        pytest.param(
            "reduce_phases.cuh", {"  stage.wait(first + kVectors);\n": "  stage.wait(first);\n"}, id="late wait"
        ),
    ],
)
def test_reading_a_copy_before_it_arrived_is_noticed(folder: Path, file: str, change: dict[str, str]) -> None:
    csrc = mutate(folder, file, change)
    done = run(build(folder, gcc(), "-O1", [BARRIERS[0], csrc / "kernels/cuda/plan.cpp"], csrc=csrc))
    assert done.returncode != 0
    assert re.search("FAILED training|without having waited", done.stdout + done.stderr), done.stdout


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        pytest.param(
            "device.cuh",
            {"    while (load_relaxed(flag) == 0) __nanosleep(kPollNanoseconds);\n": ""},
            "race",
            id="no wait",
        ),
        pytest.param(
            "reduce_phases.cuh",
            {
                "  finish_channels(op, finish, partials, range);\n  release": "  release",
                "(partials.splits));\n}": "(partials.splits));\n  finish_channels(op, finish, partials, range);\n}",
            },
            "race",
            id="released early",
        ),
        pytest.param("plan.h", {"past % 2 == 0}": "past % 2 != 0}"}, "deadlock|FAILED", id="steps out of order"),
        pytest.param("device.cuh", {"    atomicSub(flag, 1u);\n": ""}, "a ticket is not zero", id="flag is left"),
        pytest.param(
            "device.cuh",
            {"== end + gridDim.x - 1)": "== end + gridDim.x)"},
            "a ticket is not zero",
            id="counter is left",
        ),
        pytest.param(
            "device.cuh", {"atomicExch(flag, blocks);": "atomicExch(flag, blocks > 0);"}, "deadlock", id="one passes"
        ),
        pytest.param(
            "reduce.cuh",
            {"    wait_for(applicable + last % tiles);\n": ""},
            "race|a ticket is not zero",
            id="columns do not wait",
        ),
        pytest.param("reduce.cuh", {"before[number] = last;": "before[number] = end;"}, "FAILED", id="splits are lost"),
        pytest.param(
            "reduce.cuh", {"(next = before[last]) != end;": "(next = end) != end;"}, "FAILED", id="one is applied"
        ),
    ],
)
def test_a_fault_in_a_launch_of_steps_is_noticed(folder: Path, file: str, change: dict[str, str], message: str) -> None:
    csrc = mutate(folder, file, change)
    done = run(build(folder, clang(), THREAD, [BARRIERS[0], csrc / "kernels/cuda/plan.cpp"], csrc=csrc), resident=3)
    assert done.returncode != 0
    assert re.search(message, done.stdout + done.stderr), done.stdout + done.stderr


def test_a_minimal_operation_compiles() -> None:
    done = check_syntax(HERE / "contract.cpp")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("static Sum merge", "a reduce Op needs static Sum identity(k) and static Sum merge(k, a, b)"),
        ("void fold", "a reduce Op needs fold(state, count, channel, sums) const"),
        ("void operator()", "a Finish needs operator()(channel, results, preloaded) const"),
    ],
)
def test_a_missing_member_of_an_operation_is_named(folder: Path, member: str, message: str) -> None:
    """The minimal operation without one member fails with the message of contracts.cuh."""
    text = (HERE / "contract.cpp").read_text()
    assert text.count(member) == 1
    path = folder / "contract.cpp"
    path.write_text(text.replace(member, f"{member.rpartition(' ')[0]} renamed"))
    done = check_syntax(path)
    assert done.returncode != 0
    assert f"static assertion failed: {message}" in done.stderr, done.stderr


def test_approximations_are_within_half_a_unit(cache: Path, record_property: Callable[[str, str], None]) -> None:
    done = run(build(cache, gcc(), PLAIN, [HERE / "approximations.cpp"]))
    assert done.returncode == 0, done.stdout
    record_property("table", done.stdout)


@pytest.mark.parametrize("flags", [ADDRESS, THREAD])
def test_concurrent_launches_share_no_tickets(cache: Path, flags: str) -> None:
    done = run(build(cache, clang() if flags == THREAD else gcc(), flags, [HERE / "tickets.cpp"]))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("part", ["a.device, ", "a.stream, ", "a.thread, ", ", a.capture"])
def test_every_part_of_a_ticket_key_is_compared(folder: Path, part: str) -> None:
    csrc = mutate(folder, "tickets.h", {part: "", part.replace("a.", "b."): ""})
    done = run(build(folder, gcc(), "-O1", [HERE / "tickets.cpp"], csrc=csrc))
    assert "FAILED" in done.stdout


def test_a_build_is_reused(cache: Path) -> None:
    first = build(cache, gcc(), PLAIN, [HERE / "faults.cpp"])
    stamp = first.stat().st_mtime_ns
    assert build(cache, gcc(), PLAIN, [HERE / "faults.cpp"]).stat().st_mtime_ns == stamp


def test_a_plain_shared_variable_does_not_compile(folder: Path) -> None:
    """A plain __shared__ would be a variable per thread on the CPU; NF_SHARED works with both compilers."""
    source = folder / "plain.cpp"
    source.write_text('#include "cuda_host.h"\n__global__ void kernel() { __shared__ int s; (void)s; }\n')
    with pytest.raises(subprocess.CalledProcessError):
        build(folder, gcc(), PLAIN, [source])
