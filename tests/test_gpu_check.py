"""benchmarks/gpu_check.py on any machine: time limits, archives, verdicts, and a rehearsal."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu_build  # noqa: E402
import gpu_check  # noqa: E402
import gpu_render  # noqa: E402
import gpu_stages  # noqa: E402
import pytest_record  # noqa: E402
import stage_runner  # noqa: E402
from gpu_stages import RUNS, STAGES, Context  # noqa: E402
from stage_runner import Command, NotProven, Run  # noqa: E402

SAY = [sys.executable, "-S", "-c", "print('first'); print('last line')"]
FAIL = [sys.executable, "-S", "-c", "print('why'); raise SystemExit(3)"]
SLEEP = "import time; time.sleep(600)"
# Two processes. The second outlives the first if only the first is killed. Prints both process ids.
FAMILY = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", {SLEEP!r}])
print(os.getpid(), child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "results", tmp_path / "out.tar.gz", 60, {"rehearsal": True, "device": "none"})


def verdicts(run: Run) -> list[tuple[str, str, str]]:
    """The verdicts in the archive."""
    with tarfile.open(run.archive) as tar:
        file = tar.extractfile("./verdicts.json")
        assert file is not None
        return [(v["stage"], v["status"], v["summary"]) for v in json.load(file)["verdicts"]]


def test_each_stage_leaves_verdict_and_log_as_it_ends(run: Run) -> None:
    run.stage("one", 30, lambda seconds: [Command(SAY), Command(SAY)])
    assert verdicts(run) == [("one", "passed", "last line; last line")]
    run.stage("two", 30, lambda seconds: [Command(FAIL), Command(SAY)])  # stops at the command that failed
    assert verdicts(run)[1] == ("two", "failed", "exit status 3: why")
    run.stage("three", 30, lambda seconds: "there is none")
    assert verdicts(run)[2] == ("three", "skipped", "there is none")
    with tarfile.open(run.archive) as tar:
        logs = {name: tar.extractfile(f"./logs/{name}.log").read().decode() for name in ("one", "two")}  # type: ignore[union-attr]
    assert logs["one"].count("last line\n") == 2
    assert "last line\n" not in logs["two"].partition("why\n")[2]


def alive(process: int) -> bool:
    """Whether the process runs. A zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(processes: Sequence[int]) -> bool:
    end = time.monotonic() + 10
    while any(map(alive, processes)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@needs_proc
def test_at_its_cap_all_processes_of_a_stage_are_killed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_runner, "LEAST_SECONDS", 0.5)
    run.stage("slow", 3, lambda seconds: [Command([sys.executable, "-S", "-c", FAMILY])])
    ((_, status, summary),) = verdicts(run)
    assert status == "killed"
    pids = [int(word) for word in summary.removeprefix("at its cap: ").split()]
    assert len(pids) == 2, summary
    assert gone(pids)
    run.stage("next", 30, lambda seconds: [Command(SAY)])
    assert verdicts(run)[1][1] == "passed"


@needs_proc
def test_processes_left_by_a_stage_are_killed(run: Run) -> None:
    leave = FAMILY.replace("child.wait()", "")
    run.stage("leaves", 30, lambda seconds: [Command([sys.executable, "-S", "-c", leave])])
    ((_, status, summary),) = verdicts(run)
    assert status == "passed"
    assert gone([int(word) for word in summary.split()])


@needs_proc
def test_terminating_a_run_terminates_its_stage(tmp_path: Path) -> None:
    """As by a time limit of the whole command."""
    code = f"""
import signal, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
from gpu_check import _terminated
from stage_runner import Command, Run
signal.signal(signal.SIGTERM, _terminated)
run = Run(Path("results"), Path("out.tar.gz"), 60, {{}})
run.stage("slow", 50, lambda seconds: [Command([sys.executable, "-S", "-c", {FAMILY!r}])])
"""
    log = tmp_path / "results/logs/slow.log"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) as process:
        end = time.monotonic() + 60
        while not (found := re.findall(r"^(\d+) (\d+)$", log.read_text() if log.exists() else "", re.MULTILINE)):
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert gone([int(word) for word in found[0]])


def test_a_stage_without_time_is_not_started(tmp_path: Path) -> None:
    run = Run(tmp_path / "results", tmp_path / "out.tar.gz", stage_runner.LEAST_SECONDS, {})
    run.stage("late", 100, lambda seconds: [Command(SAY)])
    assert verdicts(run) == [("late", "not run", "no time was left")]


def test_a_stage_gets_at_most_the_remaining_time(tmp_path: Path) -> None:
    given: list[float] = []
    run = Run(tmp_path / "results", tmp_path / "out.tar.gz", 60, {})
    run.stage("long", 1000, lambda seconds: given.append(seconds) or "nothing to do")  # type: ignore[func-returns-value]
    assert 50 < given[0] <= 60 - stage_runner.RESERVED_SECONDS


# Verdicts: a stage passes only if its output proves that it did its work.

ON_GPU = Context(False, Path("results"), None, 80 << 30, "compute-sanitizer")


def record(folder: Path, *lines: dict[str, str]) -> Context:
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Context(False, folder, None, 80 << 30, None)


PASSED = {"test": "tests/test_cuda.py::test_a[cuda-float32]", "outcome": "passed"}
ON_CPU = {"test": "tests/test_cuda_plan.py::test_b[8x64]", "outcome": "passed"}
NO_GPU = {
    "test": "tests/test_cuda.py::test_a[cuda]",
    "outcome": "skipped",
    "reason": "torch sees no CUDA device",
}
ONE_GPU = {"test": "tests/test_cuda.py::test_c[cuda]", "outcome": "skipped", "reason": "one GPU only"}
FAILED = {"test": "tests/test_cuda.py::test_d[cuda]", "outcome": "failed", "reason": "AssertionError"}


def judged(context: Context) -> str:
    (command,) = gpu_stages.tests(context, 100)
    return command.judge("")


def test_a_test_stage_passes_by_the_tests_that_ran_on_cuda(tmp_path: Path) -> None:
    assert judged(record(tmp_path, PASSED, ON_CPU, ONE_GPU)).endswith(
        "on cuda: 1 passed, 0 failed, 1 skipped (1 × one GPU only)"
    )


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([ON_CPU], "no test ran on cuda"),
        ([], "no test ran on cuda"),
        ([ON_CPU, NO_GPU], "no test ran on cuda.*torch sees no CUDA device"),
        ([PASSED, NO_GPU], "tests were kept from cuda.*torch sees no CUDA device"),
        ([PASSED, FAILED], "1 passed, 1 failed"),
        ([PASSED, {**FAILED, "test": "tests/test_x.py::test_y"}], "1 passed, 1 failed"),
    ],
)
def test_a_test_stage_without_proof_fails(tmp_path: Path, lines: list[dict[str, str]], why: str) -> None:
    with pytest.raises(NotProven, match=why):
        judged(record(tmp_path, *lines))


def test_every_file_with_a_test_that_has_a_device_is_run() -> None:
    """Found by the names of arguments, as pytest finds fixtures."""
    found = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any(a.arg == "device" for a in function.args.args):
                decorated = any("fixture" in ast.unparse(decorator) for decorator in function.decorator_list)
                if function.name.startswith("test_") or decorated:
                    found.add(path)
    found.remove(Path(__file__).parent / "test_benchmarks.py")  # has another fixture of that name
    assert found
    assert found <= set(gpu_stages.files_with_device())


def test_skip_reasons_of_fixtures_are_known() -> None:
    said = (Path(__file__).parent / "conftest.py").read_text()
    assert all(f'"{reason}' in said for reason in pytest_record.UNFIT)


def test_the_plugin_records_each_outcome(tmp_path: Path) -> None:
    """In a separate run of pytest, with a conftest that skips tests as ours does."""
    (tmp_path / "conftest.py").write_text(
        "import pytest\n@pytest.fixture\ndef device(request):\n    pytest.skip('torch sees no CUDA device')\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import pytest\ncuda = pytest.mark.parametrize('on', ['cpu', 'cuda'])\n"
        "@cuda\ndef test_good(on): pass\n@cuda\ndef test_bad(on): assert on == 'cpu'\n"
        "@cuda\ndef test_unfit(device, on): pass\n@cuda\ndef test_skipped(on): pytest.skip('one GPU only')\n"
    )
    (tmp_path / "test_broken.py").write_text("import a_package_that_is_missing\n")
    file = tmp_path / "record.jsonl"
    environment = {**os.environ, "NORMFUSED_TEST_RECORD": str(file), "NORMFUSED_TEST_DEVICE": "cuda"}
    environment["PYTHONPATH"] = str(BENCHMARKS)
    for of_this_run in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(of_this_run, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_record", str(tmp_path)]
    command.append("--continue-on-collection-errors")
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "4 deselected" in done.stdout
    counts = pytest_record.count(file, "cuda")
    assert (counts.passed, counts.failed) == (1, 2)
    assert counts.skipped == {"one GPU only": 1}
    assert counts.unfit == {"torch sees no CUDA device": 1}


RIGHT = "15 operators right on cuda; whose kernels ran was not looked at\n"


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (RIGHT, "the tool gave no summary"),
        (f"{RIGHT}========= ERROR SUMMARY: 2 errors", "ERROR SUMMARY: 2 errors"),
        ("========= ERROR SUMMARY: 0 errors", "did not come to their end"),
        (f"{RIGHT}========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", "3 hazards"),
        ("========= Device not supported", "the tool gave no summary: .*Device not supported"),
    ],
)
def test_a_sanitizer_stage_without_proof_fails(output: str, why: str) -> None:
    with pytest.raises(NotProven, match=why):
        gpu_stages.sanitized(output)


def test_a_sanitizer_that_sees_no_error_passes() -> None:
    assert gpu_stages.sanitized(f"{RIGHT}========= ERROR SUMMARY: 0 errors").endswith("error summary: 0 errors")
    gpu_stages.sanitized(f"{RIGHT}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")


def test_memcheck_must_detect_a_deliberate_fault() -> None:
    ours = "========= Invalid __global__ read of size 16 bytes\n=========     at void normfused::cuda::reduce_rows<..>"
    assert "planted" in gpu_stages.caught(ours)
    torchs = "========= Invalid __global__ read of size 4\n=========     at void at::x()"
    for output in ("========= ERROR SUMMARY: 0 errors", torchs):
        with pytest.raises(NotProven, match="a read of freed memory was not told"):
            gpu_stages.caught(output)


def test_operators_pass_if_their_kernels_were_profiled(tmp_path: Path) -> None:
    context = Context(False, tmp_path)
    (command,) = gpu_stages.operators(context, 60)
    rows = [{"operator": "a", "ours": {"normfused::cuda::k": 2}}, {"operator": "b", "ours": {}}]
    (tmp_path / "operators.json").write_text(json.dumps({"operators": rows}))
    with pytest.raises(NotProven, match="no kernel of normfused was seen for b"):
        command.judge("done")
    (tmp_path / "operators.json").write_text(json.dumps({"operators": rows[:1]}))
    assert command.judge("done") == "done"


@pytest.mark.parametrize(
    ("content", "output", "why"),
    [
        ({"results": [], "memory": [], "failures": []}, "0 of 4 cases measured", "0 of 4"),
        ({"results": [{}], "memory": [], "failures": []}, "out of time: 1 of 4 cases measured", "out of time"),
        ({"results": [{}], "memory": [], "failures": [{"name": "n", "error": "off"}]}, "1 of 4", "n: off"),
    ],
)
def test_a_grid_with_gaps_fails(tmp_path: Path, content: dict[str, Any], output: str, why: str) -> None:
    (command,) = STAGES["n256"].plan(Context(False, tmp_path), 300)
    assert isinstance(command, Command)
    (tmp_path / "n256").mkdir()
    (tmp_path / "n256/results.json").write_text(json.dumps(content))
    with pytest.raises(NotProven, match=why):
        command.judge(output)


# The commands of the stages, and their documentation.


def test_runs_contain_every_stage_once_and_fit_a_command() -> None:
    stages = [stage for names in RUNS.values() for stage in names if stage != "build"]
    assert sorted([*stages, "build"]) == sorted(STAGES)
    for name, stages_ in RUNS.items():
        assert stages_[0] == "build", name
        assert sum(STAGES[stage].cap for stage in stages_[1:]) <= 540, name
    assert sum(STAGES[stage].cap for stage in RUNS["run-1"]) <= 570  # its last stage gets the remaining time


def test_readme_has_the_runs_and_their_caps() -> None:
    text = (BENCHMARKS / "README.md").read_text()
    for name in RUNS:
        assert f"python benchmarks/gpu_check.py {name}" in text
    for name, stage in STAGES.items():
        assert re.search(rf"\| `{name}` \| {stage.cap} \|", text), f"{name}, {stage.cap} s"


def test_on_a_gpu_stages_run_cuda_on_our_kernels() -> None:
    for stage in STAGES.values():
        commands = stage.plan(ON_GPU, stage.cap)
        assert not isinstance(commands, str), f"{stage.name} would be skipped: {commands}"
        text = " ".join(map(str, commands))
        assert "--tiny" not in text
        assert stage.name in ("build", "test", "large") or "--device cuda" in text
        assert "cpu" not in re.sub(r"cpu_kernels", "", text)
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        commands = STAGES[tool].plan(ON_GPU, 60)
        assert not isinstance(commands, str)
        for command in commands:
            assert command.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
            assert ("kernel_substring=normfused" in command.argv) == (tool != "initcheck")


def test_the_patterns_match_their_cases() -> None:
    """Parsed from the command lines: a pattern that begins with a dash is not an option."""
    import report
    from cases import grid

    for name in ("first", "n256", "n32", "graphs", "compile", "memory"):
        commands = STAGES[name].plan(ON_GPU, 100)
        assert not isinstance(commands, str)
        (words,) = (command.argv[2:] for command in commands if command.argv[1].endswith("report.py"))
        options = report._parser().parse_args(words)
        cases = [case for case in grid("cuda", quick=options.quick) if re.search(options.only, case.name)]
        assert bool(cases) == (name != "memory")

    def found(pattern: str, **options: bool) -> int:
        return sum(re.search(pattern, case.name) is not None for case in grid("cuda", **options))

    assert found(gpu_stages.FIRST, quick=True) == 20
    assert found("-256x") == 9 * 4 * 8
    assert found("-32x|small_call") == 9 * 4 * 8 + 4
    assert found("-256x") + found("-32x|small_call") == len(grid("cuda"))
    assert found(gpu_stages.GRAPHS) == 9 * 4 * 4
    assert found(gpu_stages.COMPILED) == 2 * 2 * 4


def test_without_a_gpu_it_exits_with_a_message() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu_check.py", "run-1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "sees no CUDA device" in done.stderr


def test_an_unknown_stage_is_refused() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu_check.py", "grid"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown stage 'grid': must be one of run-1, run-2" in done.stderr


# The rehearsal, and what follows a run.


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    import normfused

    if normfused.info()["extension"] != "loaded":
        pytest.skip(f"needs the extension: {normfused.info()['fallback_reason']}")
    out = tmp_path_factory.mktemp("out")
    paths = [str(Path(normfused.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OUT": str(out), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for of_this_run in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(of_this_run, None)
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--rehearse"]
    return subprocess.run(command, env=environment, capture_output=True, text=True), out


def test_a_rehearsal_runs_every_stage(rehearsal: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = rehearsal
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    (archive,) = out.iterdir()
    assert archive.name.startswith("rehearsal-")
    for stage in STAGES.values():
        assert f"{stage.name}: {stage.what}; at most {stage.cap} s. On a GPU:" in done.stdout
        assert re.search(rf"^{stage.name} +(passed|SKIPPED)", done.stdout, re.MULTILINE), stage.name
    skipped = re.findall(r"^(\w+) +SKIPPED", done.stdout, re.MULTILINE)
    assert skipped == ["racecheck", "synccheck", "initcheck"]
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
    for stage in set(STAGES) - set(skipped):
        assert f"./logs/{stage}.log" in names
    measured = [f"{name}/results.json" for name in (*gpu_render.ALONE, "n256", "n32")]
    for name in (
        *measured,
        "memory.json",
        "activations.json",
        "images.json",
        "norms.json",
        "public.json",
        "test.jsonl",
    ):
        assert f"./{name}" in names


def test_a_rehearsal_renders_but_not_among_results(
    rehearsal: tuple[subprocess.CompletedProcess[str], Path], tmp_path: Path
) -> None:
    import gpu_render

    (archive,) = rehearsal[1].iterdir()
    assert gpu_render.main([archive], gpu_render.RESULTS / "rehearsal") == 1
    assert not (gpu_render.RESULTS / "rehearsal").exists()
    assert gpu_render.main([archive, archive], tmp_path) == 0
    assert "A rehearsal: nothing here says anything of a GPU" in (tmp_path / "check.md").read_text()
    assert "A rehearsal: tiny tensors, two rounds; no figures" in (tmp_path / "table.md").read_text()
    for name in (
        "table.md",
        "graphs/table.md",
        "compile/table.md",
        "memory.md",
        "activations.md",
        "images.md",
        "norms.md",
    ):
        assert gpu_render.REHEARSAL in (tmp_path / name).read_text().splitlines()[0], name
    for name in ("speedup-n2.svg", "floor-n2.svg", "memory.svg", "norms.svg"):
        assert (tmp_path / name).stat().st_size > 0, name


def test_archives_of_a_device_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later result of a case counts. A case that failed first and then passed is not a failure."""
    import gpu_render
    import report
    import timing

    result = {"name": "a", "rounds": 1}
    described = {"revision": None, "device": "cuda"}
    settings = {"least_rounds": timing.FULL.min_rounds, "partial": True}
    first = report.Report(described, settings, [result], [], [{"name": "b", "error": "x"}, {"name": "c", "error": "x"}])
    second = report.Report(described, settings, [{**result, "rounds": 2}, {"name": "b"}])  # type: ignore[list-item, typeddict-item]
    monkeypatch.setattr(report.Report, "render", lambda self, folder: None)
    gpu_render.merge([first, second], tmp_path)
    merged = report.Report.load(tmp_path)
    assert [r["name"] for r in merged.results] == ["a", "b"]
    assert merged.results[0]["rounds"] == 2
    assert merged.failures == [{"name": "c", "error": "x"}]
    assert merged.settings["partial"] is False


def test_a_wheel_is_built_once_and_uses_the_checkouts_python_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_build, "FOLDER", tmp_path)

    def pip(command: list[str], **_: Any) -> None:
        folder = Path(command[command.index("--wheel-dir") + 1])
        folder.mkdir()
        with zipfile.ZipFile(folder / "normfused-0.1.0-cp3-cp3-linux.whl", "w") as wheel:
            wheel.writestr("normfused/_C.so", "compiled")
            wheel.writestr("normfused/__init__.py", "old")
            wheel.writestr("normfused/_build_info.json", "of the wheel")

    monkeypatch.setattr(gpu_build.subprocess, "run", pip)
    wheel = gpu_build.build()
    assert wheel.parent == tmp_path
    monkeypatch.setattr(gpu_build.subprocess, "run", lambda *_, **__: pytest.fail("built again"))
    assert gpu_build.build() == wheel
    for _ in range(2):
        package = gpu_build.unpack(wheel) / "normfused"
        assert package.parent == gpu_build.site()
        assert (package / "_C.so").read_text() == "compiled"
        assert (package / "_build_info.json").read_text() == "of the wheel"
        source = gpu_build.ROOT / "normfused/__init__.py"
        assert (package / "__init__.py").read_text() == source.read_text()
        assert not [path for path in package.rglob("*.so") if path.name != "_C.so"]
        (package / "__init__.py").write_text("of another checkout")


def test_rendered_files_do_not_change_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    for name in ("benchmarks/results/gpu/table.md", "benchmarks/report.py", "benchmarks/__pycache__/report.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    digests = {gpu_build.digest(("benchmarks",))}
    for name in ("benchmarks/results/gpu/table.md", "benchmarks/__pycache__/report.pyc"):
        (tmp_path / name).write_text("2")
        digests.add(gpu_build.digest(("benchmarks",)))
    assert len(digests) == 1
    (tmp_path / "benchmarks/report.py").write_text("2")
    assert gpu_build.digest(("benchmarks",)) not in digests
    assert gpu_build.digest(("benchmarks",), "for another GPU") != gpu_build.digest(("benchmarks",))


def test_a_revision_is_named_only_if_the_sources_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_render

    monkeypatch.setattr(gpu_render.gpu_build, "sources", lambda: "same")
    monkeypatch.setattr(gpu_render.machine, "revision", lambda: "abc1234")
    assert gpu_render.revision({"revision": None}, {"revision": None, "sources": "same"}) == "abc1234"
    assert gpu_render.revision({"revision": None}, {"revision": None, "sources": "other"}) == "sources other"
    assert gpu_render.revision({"revision": None}, {"revision": "own", "sources": "other"}) == "own"


def test_stages_of_runs_are_run_once() -> None:
    assert gpu_check.expand(["run-1", "run-2"]).count("build") == 1
