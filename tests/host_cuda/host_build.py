"""Builds the CUDA kernels for the CPU, with and without sanitizers."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc/kernels/cuda"
LAUNCHERS = [*sorted(KERNELS.glob("*.cu")), KERNELS / "plan.cpp"]

# Kernels access memory as vectors of another type, which nvcc defines; other compilers need -fno-strict-aliasing.
COMMON = "-std=c++20 -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-strict-aliasing"
PLAIN = "-O1"
ADDRESS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
THREAD = "-O1 -g1 -fsanitize=thread -DNORMFUSED_CUDA_THREADS=64"


def cuda_headers() -> Path:
    """The headers of a CUDA toolkit, or of the wheels in the test extra."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", f"{sysconfig.get_path('purelib')}/nvidia/cu13"]
    for home in homes:
        if home and (Path(home) / "include/cuda_bf16.h").exists():
            return Path(home) / "include"
    pytest.skip("no CUDA headers: install the test extra, or a CUDA toolkit")


def gcc() -> str:
    compiler = shutil.which("g++")
    return compiler or pytest.skip("no g++")


def clang() -> str:
    """A clang++ with ThreadSanitizer. g++ takes twenty times as long to compile the kernels with it."""
    for name in ("clang++", "clang++-19", "clang++-18", "clang++-17", "clang++-16"):
        compiler = shutil.which(name)
        if compiler is None:
            continue
        program = [compiler, "-fsanitize=thread", "-x", "c++", "-", "-o", os.devnull]
        if subprocess.run(program, input=b"int main() {}", capture_output=True).returncode == 0:
            return compiler
    pytest.skip("no clang++ with ThreadSanitizer")


def compile_command(compiler: str, flags: str, csrc: Path = ROOT / "csrc") -> list[str]:
    include = [csrc, HERE, ROOT / "tests/kernels"]
    command = [compiler, *shlex.split(COMMON), *shlex.split(flags), *(f"-I{path}" for path in include)]
    return [*command, "-isystem", str(cuda_headers())]


def check_syntax(source: Path) -> subprocess.CompletedProcess[str]:
    """Compiles a source without generating code."""
    command = [*compile_command(gcc(), "-fsyntax-only"), str(source)]
    return subprocess.run(command, capture_output=True, text=True)


def build(
    cache: Path,
    compiler: str,
    flags: str,
    sources: Sequence[Path],
    csrc: Path = ROOT / "csrc",
    link: Sequence[str] = (),
) -> Path:
    """Returns the program of some sources. It is built again only if a source, a header or the command has changed."""
    command = compile_command(compiler, flags, csrc)
    digest = hashlib.sha256(" ".join(map(str, [*command, *sources])).encode())
    for folder in (csrc, HERE, ROOT / "tests/kernels"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".h", ".cuh", ".cu", ".cpp"}:
                digest.update(path.read_bytes())
    program = cache / f"{sources[0].stem}-{digest.hexdigest()[:16]}"
    if program.exists():
        return program

    def compile_one(source: Path) -> Path:
        target = program.with_name(f"{program.name}-{source.parent.name}-{source.name}.o")
        subprocess.run([*command, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    linked = program.with_suffix(".new")
    subprocess.run([compiler, *shlex.split(flags), *objects, *link, "-o", linked], check=True)
    linked.rename(program)
    for path in objects:
        path.unlink()
    return program


def run(program: Path, *arguments: str, order: int = 0, resident: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a program with threads, warps and blocks in an order: 0 ascending, 1 descending, others shuffled by it.

    `resident` is the maximum number of blocks that run at the same time.
    """
    environment = {**os.environ, "CUDAHOST_ORDER": str(order), "CUDAHOST_RESIDENT": str(resident)}
    if (symbolizer := shutil.which("addr2line")) is not None:
        environment.setdefault("TSAN_OPTIONS", f"external_symbolizer_path={symbolizer}")
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, timeout=1200)
