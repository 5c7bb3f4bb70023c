"""Builds the C++ code that needs no torch with every compiler that is present, and runs what can run here.

``python tests/compilers/matrix.py`` prints a table: compiler, platform, what was built, how it ran. With ``--kernels``
the CPU kernels are built and tested too, several minutes for each compiler. Names of compilers select some of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = ["-std=c++17", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
INCLUDE = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/kernels'}"]
# The kernels of one instruction set take a minute or more.
KERNELS = [f"csrc/kernels/cpu/{name}.cpp" for name in ("baseline", "avx2", "avx512")]
LIGHT = [
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc/kernels").glob("*/*.cpp"))),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc/memory").glob("*.cpp"))),
    *("tests/compilers/portable.cpp", "tests/cpu_kernels/plans.cpp"),
]
PORTABLE = ["tests/compilers/portable.cpp", "csrc/memory/system.cpp"]
PORTABLE += [f"csrc/kernels/cpu/{name}.cpp" for name in ("merge_ranks", "workspace")]
PLANS = ["tests/cpu_kernels/plans.cpp", "csrc/kernels/cpu/plan.cpp"]
DRIVER = ["tests/cpu_kernels/main.cpp", *KERNELS]
DRIVER += [f"csrc/kernels/cpu/{name}.cpp" for name in ("dispatch", "merge_ranks", "plan", "value_counts", "workspace")]


class Compiler(NamedTuple):
    """A compiler and the platform of its programs. ``runner`` is the command that runs them here, if there is one."""

    name: str
    platform: str
    command: tuple[str, ...]
    runner: tuple[str, ...] | None = ()
    link: tuple[str, ...] = ("-pthread",)

    def missing(self) -> str | None:
        """Return the name of the compiler if it is not installed."""
        if "ziglang" in self.command:
            return None if importlib.util.find_spec("ziglang") else "package ziglang"
        return None if shutil.which(self.command[0]) else self.command[0]

    def why_not_run(self) -> str | None:
        """Return why its programs cannot run here, or None."""
        if self.runner is None:
            return f"nothing runs programs of {self.platform}"
        return next((f"no {program}" for program in self.runner[:1] if shutil.which(program) is None), None)

    def version(self) -> str:
        """Return the first line of ``--version``."""
        command = [*self.command, "--version"]
        with tempfile.TemporaryDirectory() as folder:  # zig writes a file
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[0]


def _compilers() -> list[Compiler]:
    # For other platforms programs are linked statically, to run without that platform's libraries.
    aarch64, windows = ("qemu-aarch64",), ("wine",)
    static = ("-static", "-pthread")
    found = [Compiler(f"g++-{n}", "x86-64 Linux", (f"g++-{n}",)) for n in range(10, 16)]
    found += [Compiler(f"clang++-{n}", "x86-64 Linux", (f"clang++-{n}",)) for n in range(14, 24)]
    found.append(Compiler("g++", "aarch64 Linux", ("aarch64-linux-gnu-g++",), aarch64, static))
    found += [
        Compiler(f"clang++-{n}", "aarch64 Linux", (f"clang++-{n}", "--target=aarch64-linux-gnu"), aarch64, static)
        for n in (14, 19)
    ]
    mingw = "x86_64-w64-mingw32"
    found.append(Compiler("g++ (MinGW)", "x86-64 Windows", (f"{mingw}-g++-posix",), windows, static))
    found.append(Compiler("clang++-19", "x86-64 Windows", ("clang++-19", f"--target={mingw}"), windows, static))
    for target, platform in (
        ("aarch64-macos", "aarch64 macOS"),
        ("x86_64-macos", "x86-64 macOS"),
        ("aarch64-windows-gnu", "aarch64 Windows"),
        ("x86_64-windows-gnu", "x86-64 Windows"),
        ("aarch64-linux-gnu", "aarch64 Linux"),
    ):
        command = (sys.executable, "-m", "ziglang", "c++", "-target", target)
        found.append(Compiler("zig c++", platform, command, None))
    return found


COMPILERS = _compilers()


def compile_sources(compiler: Compiler, sources: Sequence[str], folder: Path) -> list[Path]:
    """Compile without warnings. Returns the objects; those that are in the folder are not compiled again."""
    objects = [folder / f"{source.replace('/', '_')}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        if not target.exists():
            level = "-O1" if source in KERNELS else "-O2"  # GCC uses fused multiply-add from -O2 on
            _run([*compiler.command, level, *FLAGS, *INCLUDE, "-c", str(ROOT / source), "-o", str(target)])
    return objects


def output_of(compiler: Compiler, sources: Sequence[str], folder: Path, **variables: str) -> str:
    """Build a program, run it and return what it prints."""
    assert compiler.runner is not None
    program = folder / f"{Path(sources[0]).stem}.exe"
    if not program.exists():
        objects = map(str, compile_sources(compiler, sources, folder))
        _run([*compiler.command, *objects, *compiler.link, "-o", str(program)])
    return _run([*compiler.runner, str(program)], **variables)


def _run(command: Sequence[str], **variables: str) -> str:
    caches = {"ZIG_GLOBAL_CACHE_DIR": str(Path(tempfile.gettempdir()) / "normfused-zig"), "WINEDEBUG": "-all"}
    environment = {**caches, **os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


# ---- what portable.cpp must print ------------------------------------------------------------------------------------

RANKS, CHANNELS = 5, 40


def merged_statistics() -> dict[str, list[float]]:
    """The statistics that portable.cpp prints, by Python's arithmetic, which rounds after each operation."""
    state = 7

    def random() -> float:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 12) * 2.0**-52

    messages = [[random() + i % 2 for i in range(1, 2 * CHANNELS + 1)] for _ in range(RANKS)]
    running_mean, running_var = ([random() for _ in range(CHANNELS)] for _ in range(2))
    results: dict[str, list[float]] = {"mean": [], "invstd": [], "running_mean": [], "running_var": []}
    for c in range(CHANNELS):
        count, mean, m2 = 0, 0.0, 0.0
        for rank, message in enumerate(messages):
            n, rank_mean, deviation = 3 + 1000 * rank, message[2 * c], message[2 * c + 1]
            rank_m2 = deviation * deviation * n
            if count == 0:
                count, mean, m2 = n, rank_mean, rank_m2
                continue
            share, delta = n / (count + n), rank_mean - mean
            m2 = m2 + rank_m2 + delta * delta * (count * share)
            count, mean = count + n, mean + delta * share
        variance = m2 / count
        results["mean"].append(mean)
        results["invstd"].append(1 / (variance + 1e-5) ** 0.5)
        results["running_mean"].append((1 - 0.1) * running_mean[c] + 0.1 * mean)
        results["running_var"].append((1 - 0.1) * running_var[c] + 0.1 * (variance * count / (count - 1)))
    return results


def check_portable(compiler: Compiler, folder: Path) -> None:
    """The bits of merged statistics, the instruction sets, and the memory pool."""
    lines = dict(line.split(" ", 1) for line in output_of(compiler, PORTABLE, folder).splitlines())
    for name, values in merged_statistics().items():
        assert lines[name] == " ".join(struct.pack(">d", value).hex() for value in values), name
    assert lines.get("compiler") == lines.get("cpuid") or compiler.platform == "x86-64 Windows", lines
    assert lines["pool"] == ("1" if "Linux" in compiler.platform else "0"), lines


# ---- the table -------------------------------------------------------------------------------------------------------


def run_kernels(compiler: Compiler, folder: Path) -> str:
    """Build and test the CPU kernels for each instruction set; say what ran."""
    ran = []
    for capability in ("avx512", "avx2", "baseline"):
        printed = output_of(compiler, DRIVER, folder, NORMFUSED_CPU_CAPABILITY=capability).strip()
        if printed not in ran:
            ran.append(printed)
    return "; ".join(ran)


def report(compiler: Compiler, folder: Path, kernels: bool) -> tuple[str, str]:
    """Return what was built and what ran."""
    sources = [source for source in LIGHT if kernels or source not in KERNELS]
    compile_sources(compiler, sources, folder)
    built = f"{len(sources)} files" if kernels else f"{len(sources)} files, without the kernels"
    if why := compiler.why_not_run():
        return built, f"not run: {why}"
    check_portable(compiler, folder)
    how = f"by {compiler.runner[0]}: " if compiler.runner else ""
    return built, how + (run_kernels(compiler, folder) if kernels else "merged statistics")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="compilers, such as g++-12; all that are present by default")
    parser.add_argument("--kernels", action="store_true", help="build and test the CPU kernels too")
    chosen = parser.parse_args()
    print("| compiler | version | platform | built | ran |\n| --- | --- | --- | --- | --- |")
    failed = False
    for compiler in COMPILERS:
        if chosen.names and compiler.name not in chosen.names:
            continue
        version = built = "–"
        if missing := compiler.missing():
            ran = f"not run: no {missing}"
        else:
            version = compiler.version()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    built, ran = report(compiler, Path(folder), chosen.kernels)
                except AssertionError as error:
                    failed, ran = True, "**failed**"
                    print(error, file=sys.stderr)
        print(f"| {compiler.name} | {version} | {compiler.platform} | {built} | {ran} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
