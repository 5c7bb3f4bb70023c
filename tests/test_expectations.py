"""``--expect`` of ``expectations.py`` fails a run that lacks the evidence, in each way that it can be lacking."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import expectations
import pytest

from normfused import _extension

pytestmark = pytest.mark.usefixtures("needs_extension")

Captured = pytest.CaptureFixture[str]

CALLS = "import torch, normfused\ndef test_call(): normfused.channel_sums(torch.ones(2, 3, 4))\n"
NO_CALLS = "def test_nothing(): pass\n"
SKIPPED = "import pytest\n@pytest.mark.skip('no compiler')\ndef test_skipped(): pass\n"
LAUNCHES = "import os\ndef test_launches(): open(os.environ['CUDAHOST_LAUNCHES'], 'a').write('2\\n')\n"
OTHER_MACHINE = "import pytest\ndef test_other(): pytest.skip('this machine supports avx2 at most')\n"


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(expectations, "nvcc", lambda: None)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file that is written twice in a second looks unchanged
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def write(suite: Path, **files: str) -> None:
    for name, text in files.items():
        file = suite / name.replace("__", "/")
        file.parent.mkdir(exist_ok=True)
        file.with_suffix(".py").write_text(text)


def run(suite: Path, expect: str, *options: str) -> int:
    arguments = ["-q", "-p", "expectations", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={suite}"]
    loaded = set(sys.modules)
    try:
        return pytest.main([*arguments, f"--expect={expect}", *options, str(suite)])
    finally:
        for name in set(sys.modules) - loaded:  # files of other tests have the same names
            del sys.modules[name]


def passes(suite: Path, expect: str, capsys: Captured) -> None:
    assert run(suite, expect) == 0
    assert f"met: {expect}" in capsys.readouterr().out


def fails(suite: Path, expect: str, message: str, capsys: Captured, *options: str) -> None:
    assert run(suite, expect, *options) != 0
    assert f"NOT MET {message}" in capsys.readouterr().out


def test_calls_of_operators(suite: Path, capsys: Captured) -> None:
    write(suite, test_a=CALLS)
    passes(suite, "extension best", capsys)
    fails(suite, "operators", "operators: operators that were not called: batch_norm_backward, ", capsys)
    write(suite, test_a=NO_CALLS)
    fails(suite, "extension", "extension: no operator was called", capsys)


def test_the_extension_is_loaded(suite: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    write(suite, test_a=CALLS)
    monkeypatch.setattr(_extension, "C", None)
    fails(suite, "extension", "extension: the extension is not loaded", capsys)


def test_the_instruction_set(suite: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    write(suite, test_a=CALLS)
    ran = _extension.C.cpu_capability()
    other = "avx2" if ran == "baseline" else "baseline"
    passes(suite, ran, capsys)
    fails(suite, other, f"{other}: a process ran {ran}, expected {other}", capsys)
    monkeypatch.setattr(expectations, "INSTRUCTION_SETS", {})
    fails(suite, "best", f"best: a process ran {ran}, expected None", capsys)


def test_launches_in_the_simulator(suite: Path, capsys: Captured) -> None:
    write(suite, test_a=CALLS)
    fails(suite, "simulator", "simulator: no CUDA kernel was launched", capsys)
    write(suite, test_a=LAUNCHES)
    passes(suite, "simulator", capsys)
    assert "CUDAHOST_LAUNCHES" not in os.environ


def test_tests_that_compile(suite: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    write(suite, cpu_kernels__test_a=NO_CALLS, host_cuda__test_b=NO_CALLS, memory__test_c=NO_CALLS)
    passes(suite, "compiled", capsys)
    write(suite, cpu_kernels__test_d=OTHER_MACHINE)
    passes(suite, "compiled", capsys)
    monkeypatch.setattr(expectations, "nvcc", lambda: "nvcc")
    fails(suite, "compiled", "compiled: no test of cuda_build passed", capsys)
    monkeypatch.setattr(expectations, "nvcc", lambda: None)
    fails(suite, "compiled", "compiled: no test of memory passed", capsys, "--deselect=memory")
    write(suite, memory__test_c=SKIPPED)
    fails(suite, "compiled", "compiled: memory/test_c.py::test_skipped was skipped: Skipped: no compiler", capsys)


def test_an_empty_run(suite: Path, capsys: Captured) -> None:
    for word in ("extension", "operators", "simulator", "compiled"):
        fails(suite, word, f"{word}: ", capsys)


@pytest.mark.parametrize("words", ["", "fast", "extension, best"])
def test_unknown_words(words: str, suite: Path, capsys: Captured) -> None:
    assert run(suite, words) == pytest.ExitCode.USAGE_ERROR
    assert "--expect: expected words of extension" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "result", "line"),
    [
        ({"test_a": CALLS, "test_b": CALLS}, 0, "2 tests passed in 2 processes; 2 calls of operators"),
        ({"test_a": NO_CALLS, "test_b": NO_CALLS}, 1, "NOT MET extension: no operator was called"),
        ({"test_a": CALLS, "test_b": "import os\ndef test_crash(): os._exit(1)\n"}, 1, "ended without evidence"),
    ],
    ids=["calls", "no calls", "a crash"],
)
def test_several_processes(suite: Path, files: dict[str, str], result: int, line: str) -> None:
    write(suite, **files)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-p", "expectations", "-p", "no:cacheprovider", "-n", "2"]
    done = subprocess.run(
        [*command, "--max-worker-restart=0", "--dist=loadfile", "--expect=extension best", f"--rootdir={suite}", suite],
        cwd=suite,  # not the checkout: its normfused/ may have no extension
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == result, done.stdout + done.stderr
    assert line in done.stdout
