"""Fuzzing of the CPU kernels, of the plans and of the readers of files. NORMFUSED_FUZZ_SECONDS: of each target."""

from __future__ import annotations

import os
import random
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import fuzz_build
import pytest
import readers

from normfused.data import arrays, files, records

SECONDS = os.environ.get("NORMFUSED_FUZZ_SECONDS")
DEFAULT_SECONDS = {"plans": 8, "kernels": 30}
DEFAULT_FILES = 1000  # of each kind
RANDOM_INPUTS = 2000  # under MemorySanitizer


@pytest.fixture(scope="session")
def compiler() -> str:
    return fuzz_build.clang() or pytest.skip("no clang++ with libFuzzer")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def fuzz(program: Path, target: str, folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """Replays the corpus, then fuzzes. New inputs are kept in the folder, that of a failure as crash-*."""
    corpus, new = fuzz_build.unpack(target, folder / "corpus"), folder / "new"
    new.mkdir()
    options = ["-seed=1", "-max_len=192", "-len_control=0", "-print_final_stats=1", f"-artifact_prefix={folder}/"]
    command = [program, *options, f"-max_total_time={seconds}", new, corpus]
    return subprocess.run(command, capture_output=True, text=True, errors="replace")


def figures(done: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(line for line in done.stderr.splitlines() if line.startswith("stat::") or "DONE" in line)


@pytest.mark.parametrize("target", ["plans", "kernels"])
def test_targets(
    compiler: str, built: Path, tmp_path: Path, target: str, record_property: Callable[[str, str], None]
) -> None:
    program = fuzz_build.build(compiler, target, built)
    done = fuzz(program, target, tmp_path, float(SECONDS or DEFAULT_SECONDS[target]))
    inputs = {path.name: path.read_bytes().hex() for path in tmp_path.glob("*-*")}
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-6000:]}\n{inputs}"
    record_property("table", figures(done))


def test_no_kernel_reads_uninitialized_memory(compiler: str, tmp_path: Path) -> None:
    if SECONDS is None:
        pytest.skip("compiles the kernels once more: set NORMFUSED_FUZZ_SECONDS")
    program = fuzz_build.build(compiler, "kernels", tmp_path / "built", fuzz_build.MEMORY)
    inputs = sorted(fuzz_build.unpack("kernels", tmp_path / "corpus").iterdir())
    done = subprocess.run([program, str(RANDOM_INPUTS), *inputs], capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-6000:]}"


@pytest.mark.parametrize(
    ("target", "file", "old", "new", "report"),
    [
        pytest.param(
            "plans",
            "csrc/kernels/cpu/plan.cpp",
            "return (a + b - 1) / b;",
            "return a / b;",
            "FAILED line",
            id="lost rest",
        ),
        pytest.param(
            "plans",
            "csrc/kernels/cuda/plan.cpp",
            "plan.height = kThreads /",
            "plan.height = 1 + kThreads /",
            "FAILED line",
            id="too many threads",
        ),
        pytest.param(
            "kernels",
            "csrc/kernels/cpu/value_counts.cpp",
            "for (; i < n; ++i) add",
            "for (; i + 1 < n; ++i) add",
            "FAILED counts",
            id="lost tail",
        ),
        pytest.param(
            "kernels",
            "tests/fuzz/kernels.cpp",
            "std::min(begin + chunk, tasks)",
            "std::min(begin + chunk, tasks - (ranges > 1))",
            "FAILED",
            id="lost task",
        ),
        pytest.param(
            "kernels",
            "csrc/kernels/cpu/value_counts.cpp",
            "i + 8 <= n",
            "i + 7 <= n",
            "heap-buffer-overflow",
            id="past the end",
        ),
    ],
)
def test_a_planted_fault_is_found(
    compiler: str, built: Path, tmp_path: Path, target: str, file: str, old: str, new: str, report: str
) -> None:
    text = (fuzz_build.ROOT / file).read_text()
    assert old in text
    changed = tmp_path / Path(file).name
    changed.write_text(text.replace(old, new))
    program = fuzz_build.build(compiler, target, built, changed={file: changed})
    done = fuzz(program, target, tmp_path, 60)
    assert done.returncode != 0
    assert report in done.stdout + done.stderr


def run_reader(kind: str, folder: Path, count: int, seconds: float | None = None) -> int:
    """Reads the valid files, then files with changes: `count` of them, or for some seconds. Returns how many."""
    source, end = random.Random(1), time.monotonic() + (seconds or 0)
    path, done = folder / f"file.{kind}", 0
    contents = list(readers.SEEDS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy and Pillow about damaged files
        while contents or done < count or time.monotonic() < end:
            content = contents.pop() if contents else readers.mutate(source, readers.SEEDS[kind])
            try:
                readers.check(kind, path, content)
            except Exception as error:
                raise AssertionError(f"{kind} file {content!r}: {error!r}") from error
            done += 1
    return done


@pytest.mark.parametrize("kind", readers.SEEDS)
def test_readers(kind: str, tmp_path: Path, record_property: Callable[[str, str], None]) -> None:
    done = run_reader(kind, tmp_path, DEFAULT_FILES, float(SECONDS) if SECONDS else None)
    record_property("table", f"{kind}: {done} files")


@pytest.mark.parametrize(
    ("kind", "module", "name", "fault"),
    [
        ("npz", arrays, "_names_a_file", lambda error: isinstance(error, OSError)),
        ("idx", files, "_IDX_DTYPES", {**files._IDX_DTYPES, 0x0C: "<i4"}),
        ("json", records, "_check_record", lambda record: None),
    ],
)
def test_a_planted_fault_of_a_reader_is_found(
    kind: str, module: object, name: str, fault: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError, match=f"{kind} file"):
        run_reader(kind, tmp_path, 3 * DEFAULT_FILES)
