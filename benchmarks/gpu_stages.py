"""The stages of gpu_check.py: the commands of each, its cap in seconds, and what its output must prove."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from pytest_record import count
from stage_runner import Command, NotProven, last_line

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
# Processes of pytest-xdist; each has its own CUDA context.
WORKERS = 8
# Without the options of pyproject.toml, which ask for pytest-xdist.
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider"]
LARGE_BYTES = 40 << 30  # what tests/test_large.py needs, with a margin


@dataclass(frozen=True)
class Context:
    """Where a stage runs and writes."""

    rehearsal: bool
    folder: Path  # for raw results
    out: Path | None = None  # for other files to copy back, such as the wheel
    gpu_bytes: int = 0
    sanitizer: str | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"


# Returns the commands of a stage that has this many seconds, or the reason to skip it.
Plan = Callable[[Context, float], Sequence[Command] | str]


@dataclass(frozen=True)
class Stage:
    name: str
    cap: int  # seconds
    what: str
    plan: Plan


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / script), *arguments]


def build(context: Context, seconds: float) -> list[Command]:
    if context.rehearsal:
        return [Command(python("gpu_build.py", "--look"))]
    wheel_to = ["--wheel-to", str(context.out)] if context.out else []
    return [Command(python("gpu_build.py", *wheel_to))]


def operators(context: Context, seconds: float) -> list[Command]:
    file = context.folder / "operators.json"
    less = ["--tiny"] if context.rehearsal else ["--profile"]

    def judge(output: str) -> str:
        rows = json.loads(file.read_text())["operators"]
        silent = [row["operator"] for row in rows if not context.rehearsal and not row.get("ours")]
        if silent or not rows:
            raise NotProven(f"no kernel of normfused was seen for {', '.join(silent) or 'any operator'}")
        return last_line(output)

    return [Command(python("operators.py", "--device", context.device, "--out", str(file), *less), judge)]


# Four operations of one shape, in four variants, and the small call in four.
FIRST = "^(training_forward|training_forward_backward|eval_forward|channel_moments)-256x512x28x28|^small_call"
GRAPHS = "^(training_forward|training_forward_backward|eval_forward|channel_moments)-32x"
# Shapes whose launches are so short that the gap between two counts.
OVERLAP = "^training_forward_backward-32x(64x56|512x28|256x14|2048x7)x"
# Shapes whose channels do not fit a cluster: of pipelined launches, and of persistent ones.
PIPELINED = "^training_(forward|backward)-256x((64x112|256x56)x.*-NCHW|128x28x.*-bfloat16-channels_last)"
COMPILED = "^(training|add_relu)_forward_backward-256x(64x56|2048x7)x"  # compiling takes about ten seconds per case


def report(
    name: str, only: str, *options: str, tiny: str, environment: Mapping[str, str] = MappingProxyType({})
) -> Plan:
    """Measures the cases of the grid whose name matches `only`, by report.py; in a rehearsal those matching `tiny`."""

    def plan(context: Context, seconds: float) -> list[Command]:
        folder = context.folder / name
        # As one argument: some patterns begin with a dash.
        size = ["--tiny", "--threads", "1", f"--only={tiny}"] if context.rehearsal else [f"--only={only}"]
        least = 20 if seconds > 60 else 5  # seconds to finish a case, and for Python to start
        time = ["--seconds", f"{seconds - least:.0f}"]
        where = ["--device", context.device, "--no-render", "--out", str(folder)]

        def judge(output: str) -> str:
            measured = json.loads((folder / "results.json").read_text())
            wrong = [f"{failure['name']}: {failure['error']}" for failure in measured["failures"]]
            found = measured["results"] or measured["memory"]
            if wrong or not found or "out of time" in output:
                raise NotProven("; ".join([last_line(output), *wrong[:3]]))
            return last_line(output)

        command = python("report.py", *where, *size, *options, *time)
        return [Command(command, judge, environment, accepted=(0, 3))]

    return plan


def tests(context: Context, seconds: float) -> list[Command]:
    # A package that few tests need may be missing.
    more = ["-m", "not large and not exhaustive and not nightly", "--maxfail=60", "--continue-on-collection-errors"]
    if context.rehearsal:
        chosen = ["-k", "moments and float32 and contiguous", str(TESTS / "test_channel_stats.py")]
        return [pytest(context, "test", 1, *chosen)]
    return [pytest(context, "test", WORKERS, *more, *map(str, files_with_device()))]


def files_with_device() -> list[Path]:
    """The test files with a device parameter. Collecting the others too would take long."""
    return [path for path in sorted(TESTS.glob("test_*.py")) if "device: torch.device" in path.read_text()]


def large(context: Context, seconds: float) -> list[Command] | str:
    chosen = ["-m", "large", str(TESTS / "test_large.py")]
    if context.rehearsal:  # of 34 GB each
        return [Command([*PYTEST, "-q", "--collect-only", *chosen])]
    if context.gpu_bytes < LARGE_BYTES:
        return f"needs {LARGE_BYTES >> 30} GiB of memory on the GPU, which has {context.gpu_bytes >> 30}"
    return [pytest(context, "large", 0, *chosen)]


def pytest(context: Context, name: str, workers: int, *arguments: str) -> Command:
    """Runs tests. At least one must pass on the device, none may fail or be skipped for lack of CUDA."""
    record = context.folder / f"{name}.jsonl"
    argv = [*PYTEST, "-v", "--tb=short", "-p", "pytest_record"]
    note = ""
    if workers and find_spec("xdist"):
        argv += ["-n", str(workers)]
    elif workers:
        note = "one after the other, pytest-xdist is not installed; "
    if find_spec("pytest_timeout"):
        argv += ["--timeout", "90"]

    def judge(output: str) -> str:
        counts = count(record, context.device)
        what = f"{note}on {context.device}: {counts}"
        if counts.passed == 0:
            raise NotProven(f"no test ran on {context.device}: {counts}")
        if counts.unfit:
            raise NotProven(f"tests were kept from {context.device}: {counts}")
        if counts.failed:
            raise NotProven(what)
        return what

    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    settings = {
        "NORMFUSED_TEST_RECORD": str(record),
        "NORMFUSED_TEST_DEVICE": context.device,
        "PYTEST_ADDOPTS": "",  # no option of the caller may deselect tests
        # Several processes share the cores.
        "OMP_NUM_THREADS": "2",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": paths,
    }
    return Command([*argv, *arguments], judge, settings, accepted=(0, 1))


def sanitize(tool: str) -> Plan:
    """Runs all operators under a tool of compute-sanitizer, which checks normfused's kernels only."""

    def plan(context: Context, seconds: float) -> list[Command] | str:
        operators = python("operators.py", "--device", context.device)
        settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        if context.rehearsal:
            return [Command([*operators, "--tiny"], environment=settings)] if tool == "memcheck" else "as memcheck"
        if context.sanitizer is None:
            return "no compute-sanitizer on the PATH or in the toolkit"
        watched = [context.sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
        if tool != "initcheck":  # initcheck must see what torch's kernels write
            watched += ["--kernel-name", "kernel_substring=normfused"]
        if tool == "memcheck":
            watched += ["--report-api-errors", "no"]
        few = [] if tool == "memcheck" else ["--few"]
        commands = [Command([*watched, *operators, *few], sanitized, settings)]
        if tool == "memcheck":
            commands.insert(0, Command([*watched, *operators, "--planted"], caught, settings, accepted=(0, 9)))
        return commands

    return plan


def caught(output: str) -> str:
    """The tool must report the planted fault in a kernel of normfused."""
    if not re.search(r"Invalid __global__ read", output) or not re.search(r"normfused", output.split("Invalid", 1)[1]):
        raise NotProven(f"a read of freed memory was not told: {last_line(output)}")
    return "a planted read of freed memory was told"


def sanitized(output: str) -> str:
    """The tool must have printed a summary without errors, and the operators must have completed."""
    summary = re.search(r"(ERROR|RACECHECK) SUMMARY: .*", output)
    if summary is None or not re.search(r"SUMMARY: 0 (errors|hazards)", summary[0]):
        raise NotProven(summary[0] if summary else f"the tool gave no summary: {last_line(output)}")
    if not (ran := re.search(r"\d+ operators right on cuda", output)):
        raise NotProven(f"the operators did not come to their end: {last_line(output)}")
    return f"{ran[0]}, {summary[0].lower()}"


def script(name: str, *options: str, tiny: Sequence[str] = ()) -> Plan:
    """Runs a benchmark script."""

    def plan(context: Context, seconds: float) -> list[Command]:
        size = ["--tiny", *tiny] if context.rehearsal else list(options)
        return [Command(python(name, "--device", context.device, "--out", str(context.folder), *size))]

    return plan


ONE_THREAD = ("--threads", "1")


def memory(context: Context, seconds: float) -> list[Command]:
    plans = [script("memory.py", tiny=ONE_THREAD)]
    if not context.rehearsal:
        plans.append(report("growth", "^memory$", tiny=""))
    return [command for plan in plans for command in plan(context, seconds)]


STAGES = {
    stage.name: stage
    for stage in (
        Stage("build", 210, "builds a wheel of this checkout for this GPU, unless it exists", build),
        Stage("operators", 60, "compares each operator with float64; the profiler proves whose kernels ran", operators),
        Stage(
            "first",
            60,
            "20 cases of the grid, against torch and copy",
            report("first", FIRST, "--quick", tiny="^eval_forward-2x8.*float32-NCHW"),
        ),
        Stage("test", 240, "all tests with a device parameter, on CUDA", tests),
        Stage(
            "n256",
            240,
            "the grid at batch 256, against torch and copy",
            report("n256", "-256x", tiny="^training_forward.*-2x8x6x6-bfloat16"),
        ),
        Stage("public", 80, "published cases", script("public_rows.py")),
        Stage("norms", 100, "group, instance, layer and RMS norm, against torch", script("norms.py", tiny=ONE_THREAD)),
        Stage(
            "overlap",
            40,
            "forward and backward of 16 small cases, in one launch or in two that overlap",
            report("overlap", OVERLAP, "--quick", tiny="^eval_forward-2x8.*float32-NCHW"),
        ),
        Stage(
            "serial",
            40,
            "the same with NORMFUSED_CUDA_OVERLAP=0",
            report(
                "serial",
                OVERLAP,
                "--quick",
                tiny="^eval_forward-2x8.*float32-NCHW",
                environment={"NORMFUSED_CUDA_OVERLAP": "0"},
            ),
        ),
        Stage(
            "unstaged",
            40,
            "the same with NORMFUSED_CUDA_STAGED=0",
            report(
                "unstaged",
                OVERLAP,
                "--quick",
                tiny="^eval_forward-2x8.*float32-NCHW",
                environment={"NORMFUSED_CUDA_STAGED": "0"},
            ),
        ),
        Stage(
            "unpipelined",
            30,
            "ten cases of n256 with NORMFUSED_CUDA_PIPELINE=0",
            report(
                "unpipelined",
                PIPELINED,
                tiny="^eval_forward-2x8.*float32-NCHW",
                environment={"NORMFUSED_CUDA_PIPELINE": "0"},
            ),
        ),
        Stage("n32", 210, "the grid at batch 32", report("n32", "-32x|small_call", tiny="-2x5x7x7-float32-NCHW")),
        Stage(
            "graphs",
            110,
            "four operations at batch 32, replayed from CUDA graphs",
            report("graphs", GRAPHS, "--graphs", tiny="^eval_forward-2x5x7x7-bfloat16"),
        ),
        Stage("memcheck", 80, "accesses out of bounds; one planted fault must be reported", sanitize("memcheck")),
        Stage("racecheck", 60, "races in shared memory", sanitize("racecheck")),
        Stage("synccheck", 30, "barriers that not all threads reach", sanitize("synccheck")),
        Stage("initcheck", 40, "reads of uninitialized memory", sanitize("initcheck")),
        Stage(
            "compile",
            200,
            "a part of the grid against torch.compile and torch without cuDNN",
            report("compile", COMPILED, "--native", "--compile", tiny="^eval_forward-2x8x6x6-float32-NCHW"),
        ),
        Stage("large", 80, "tensors of 2^31 values", large),
        Stage("memory", 120, "memory saved for backward, by mode; growth over 10,000 steps", memory),
        Stage("activations", 60, "the cost of each activation", script("activations.py", tiny=ONE_THREAD)),
        Stage("images", 50, "images, statistics of data sets", script("images.py", tiny=ONE_THREAD)),
    )
}

# Runs of at most 540 s each. The most valuable stages come first, because the last may be cut off.
RUNS = {
    "run-1": ("build", "operators", "first", "test"),
    "run-2": ("build", "n256", "public", "norms", "overlap", "serial", "unstaged"),
    "run-3": ("build", "n32", "graphs", "memcheck", "racecheck", "synccheck", "initcheck"),
    "run-4": ("build", "unpipelined", "compile", "large", "memory", "activations", "images"),
}


def find_sanitizer(cuda_home: str | None) -> str | None:
    """The compute-sanitizer on the PATH or in a toolkit."""
    homes = [home for home in (cuda_home, "/usr/local/cuda") if home]
    folders = [f"{home}/{folder}" for home in homes for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
