"""Proves and measures the CUDA kernels on the GPU at hand: ``python benchmarks/gpu_check.py``.

In stages, each of which leaves its log and its verdict in ``results/<device>/check/`` as soon as it ends:

build     installs this checkout, with the kernels compiled for this GPU
test      all tests that have a device, on CUDA
sanitize  a few of them under compute-sanitizer's memcheck and racecheck, where it is there
large     tensors of 2^31 values, where memory allows
measure   the grid against torch eager, with cuDNN and without, and the copy floor; table and plots
compile   some shapes of it against torch.compile too
memory    what training keeps, by mode; what each activation costs; images and statistics of data sets
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclasses.dataclass
class Verdict:
    stage: str
    passed: bool
    seconds: float
    summary: str


class Check:
    """Runs commands with a deadline, and keeps what they say."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.deadline = time.monotonic() + seconds
        self.verdicts: list[Verdict] = []
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, stage: str, *commands: list[str], least_seconds: float) -> None:
        """A stage passes when all of its commands do; one that has too little time left is not begun.

        They run in the folder of the logs: in the checkout Python would import its folder normfused, not the
        installed package.
        """
        start = time.monotonic()
        passed, summary = True, ""
        with (self.folder / f"{stage}.log").open("w") as log:
            for command in commands:
                left = self.deadline - time.monotonic()
                if left < least_seconds:
                    passed, summary = False, f"not run: {left:.0f} s left, {least_seconds:.0f} s needed"
                    break
                print(f"$ {' '.join(command)}", file=log, flush=True)
                try:
                    done = subprocess.run(
                        command,
                        cwd=self.folder,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                        timeout=left,
                    )
                    output, code = done.stdout, done.returncode
                except subprocess.TimeoutExpired as expired:
                    output, code = _text(expired.stdout) + "\ntimed out", 124
                log.write(output)
                lines = [line for line in output.splitlines() if line.strip()]
                summary = lines[-1] if lines else f"exit {code}"
                if code != 0:
                    passed = False
                    print("\n".join(lines[-30:]), flush=True)
                    break
        self.verdict(Verdict(stage, passed, round(time.monotonic() - start, 1), summary))

    def skip(self, stage: str, reason: str) -> None:
        self.verdict(Verdict(stage, True, 0, f"skipped: {reason}"))

    def verdict(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        (self.folder / "verdicts.json").write_text(
            json.dumps([dataclasses.asdict(v) for v in self.verdicts], indent=1) + "\n"
        )
        word = "passed" if verdict.passed else "FAILED"
        print(f"{verdict.stage:9} {word} in {verdict.seconds:6.1f} s  {verdict.summary}", flush=True)


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def build(check: Check) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--force-reinstall",
        "-v",
        str(ROOT),
    ]
    os.environ["NORMFUSED_CUDA"] = "1"
    os.environ["NORMFUSED_STRICT"] = "1"
    info = [
        sys.executable,
        "-c",
        "import normfused; info = normfused.info(); print(info); assert info['cuda'], info",
    ]
    check.run("build", pip, info, least_seconds=60)


def test(check: Check) -> None:
    ignored = [f"--ignore={ROOT}/tests/{name}" for name in ("host_cuda", "cpu_kernels", "cuda_build")]
    check.run(
        "test",
        [*PYTEST, "--maxfail=30", "--continue-on-collection-errors", "-k", "cuda", *ignored, str(ROOT / "tests")],
        least_seconds=30,
    )


def sanitize(check: Check) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(sanitizer, os.X_OK):
        return check.skip("sanitize", "no compute-sanitizer")
    # The single launch; several splits of rows, of columns and of columns side by side; integers; images and windows.
    few = "same_bits and (8x64x8x8 or 32x3x65x33) or integer_sums or standardized or local_response"
    small = [*PYTEST, "-k", few, str(ROOT / "tests/test_cuda.py")]
    tools = [[sanitizer, "--tool", tool, "--error-exitcode", "1", *small] for tool in ("memcheck", "racecheck")]
    return check.run("sanitize", *tools, least_seconds=30)


def large(check: Check) -> None:
    check.run("large", [*PYTEST, "-m", "large", "-k", "cuda", str(ROOT / "tests/test_large.py")], least_seconds=30)


def measure(check: Check) -> None:
    check.run("measure", _report(check, "--native"), least_seconds=60)


def compiled(check: Check) -> None:
    only = "(forward_backward|eval_forward)-256x(64x56|512x28|2048x7)x"
    command = _report(check, "--native", "--compile", "--only", only, "--out", str(check.folder / "compile"))
    check.run("compile", command, least_seconds=60)


def _report(check: Check, *options: str) -> list[str]:
    out = [] if "--out" in options else ["--out", str(check.folder.parent)]
    return [sys.executable, str(HERE / "report.py"), "--device", "cuda", *options, *out]


def memory(check: Check) -> None:
    scripts = [HERE / name for name in ("memory.py", "activations.py", "images.py")]
    options = ["--device", "cuda", "--out", str(check.folder.parent)]
    check.run("memory", *([sys.executable, str(script), *options] for script in scripts), least_seconds=60)


STAGES: dict[str, Callable[[Check], None]] = {
    "build": build,
    "test": test,
    "sanitize": sanitize,
    "large": large,
    "measure": measure,
    "compile": compiled,
    "memory": memory,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; without any, all")
    parser.add_argument("--seconds", type=float, default=540, help="for everything (default: 540)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of results/<device> beside this file")
    arguments = parser.parse_args()
    if unknown := [stage for stage in arguments.stages if stage not in STAGES]:
        parser.error(f"unknown stage {unknown[0]!r}: must be one of {', '.join(STAGES)}")

    import torch

    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device")
    name = re.sub(r"[^a-z0-9.]+", "-", f"cuda {torch.cuda.get_device_name()}".lower()).strip("-")
    check = Check((arguments.out or HERE / "results" / name).resolve() / "check", arguments.seconds)
    for stage in arguments.stages or STAGES:
        STAGES[stage](check)
    return 0 if all(verdict.passed for verdict in check.verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
