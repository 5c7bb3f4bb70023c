"""Fuzzing of the CPU kernels and of the plans. NORMFUSED_FUZZ_SECONDS: of each target."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import fuzz_build
import pytest
import torch

SECONDS = os.environ.get("NORMFUSED_FUZZ_SECONDS")
DEFAULT_SECONDS = {"plans": 8, "kernels": 30}
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


@pytest.mark.parametrize(
    ("target", "capability"),
    [("plans", "baseline"), ("kernels", "baseline"), ("kernels", "avx2"), ("kernels", "avx512")],
)
def test_targets(
    compiler: str,
    built: Path,
    tmp_path: Path,
    target: str,
    capability: str,
    record_property: Callable[[str, str], None],
) -> None:
    supported = {"AVX2": ["avx2"], "AVX512": ["avx2", "avx512"]}.get(torch.backends.cpu.get_cpu_capability(), [])
    if capability not in ["baseline", *supported]:
        pytest.skip(f"this machine does not support {capability}")
    folder = built if capability == "baseline" else built / capability
    program = fuzz_build.build(compiler, target, folder, capability=capability)
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
