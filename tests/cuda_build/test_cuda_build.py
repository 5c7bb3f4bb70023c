"""Compiles the CUDA sources with nvcc and checks the machine code; no GPU is needed. Skipped without nvcc.

Every kernel is compiled for several architectures with torch's flags: no warning, no spill, no stack frame. The
machine code for sm_90 is disassembled: vectors are accessed with 16 bytes per instruction, enough loads are in flight,
and no slow division comes before the first load. The sources that include torch are compiled too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))
# Those in between the oldest and the newest are compiled when the CUDA build is recorded: see .ci/cuda_build.
ARCHS = tuple(os.environ.get("NORMFUSED_TEST_ARCHS", "75 90 120").split())
DISASSEMBLED = "90"  # one architecture only: disassembling all would take longer than compiling them

sys.path.insert(0, str(ROOT / "build_backend"))
from extension import NVCC_FLAGS  # noqa: E402
from sass import Function, divides_before_it_loads, functions, innermost_loops, loads_in_flight, stores  # noqa: E402


class Kernel(NamedTuple):
    arch: str
    name: str
    registers: int
    shared: int
    stack: int
    spills: int

    def family(self) -> str:
        """The template and its operations, without data types."""
        return re.sub(
            r"\b(float|double|__half|__nv_bfloat16|unsigned char|signed char|short|int|long)\b", "T", self.name
        )


def tool(name: str) -> str:
    """The path of a tool of the CUDA toolkit, or of the wheels in the test extra."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", f"{sysconfig.get_path('purelib')}/nvidia/cu13"]
    for path in [shutil.which(name), *(f"{home}/bin/{name}" for home in homes if home)]:
        if path and os.access(path, os.X_OK):
            return path
    pytest.skip(f"no {name}")


def demangle(names: list[str]) -> dict[str, str]:
    filtered = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = filtered.replace("normfused::cuda::", "").replace("(anonymous namespace)::", "")
    # The template arguments identify a kernel; its parameters follow from them.
    return {
        name: re.sub(r"^void |\(int\)|\(bool\)", "", text).partition(">(")[0] + ">"
        for name, text in zip(names, plain.splitlines(), strict=True)
    }


def read_log(arch: str, log: str) -> list[Kernel]:
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\S+)'.*?\n.*?\n"
        r"\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
        r".*?Used (?P<registers>\d+) registers(?P<rest>.*)"
    )
    found = list(pattern.finditer(log))
    names = demangle([match["name"] for match in found])
    kernels = []
    for match in found:
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels.append(
            Kernel(
                arch,
                names[match["name"]],
                int(match["registers"]),
                int(shared[1]) if shared else 0,
                int(match["stack"]),
                int(match["stores"]) + int(match["loads"]),
            )
        )
    return kernels


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, str]]:
    """The object file of each source and architecture, and the compiler's output."""
    nvcc, folder = tool("nvcc"), tmp_path_factory.mktemp("cuda_build")
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]

    def compile_one(task: tuple[Path, str]) -> tuple[Path, str]:
        source, arch = task
        target = folder / f"{source.stem}.{arch}.o"
        code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [
            nvcc,
            *cpp_extension.COMMON_NVCC_FLAGS,
            *NVCC_FLAGS,
            *strict,
            code,
            f"-I{ROOT / 'csrc'}",
            "-c",
            str(source),
            "-o",
            str(target),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target, done.stdout + done.stderr

    tasks = [(source, arch) for source in SOURCES for arch in ARCHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {
            (source.stem, arch): done for (source, arch), done in zip(tasks, pool.map(compile_one, tasks), strict=True)
        }


@pytest.fixture(scope="session")
def kernels(objects: dict[tuple[str, str], tuple[Path, str]]) -> list[Kernel]:
    return [kernel for (_, arch), (_, log) in objects.items() for kernel in read_log(arch, log)]


def test_kernels_neither_spill_nor_use_a_stack(
    kernels: list[Kernel], record_property: Callable[[str, str], None]
) -> None:
    families: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        families[kernel.family()].append(kernel)
    archs = " ".join(f"sm_{arch}".rjust(12) for arch in ARCHS)
    lines = [f"{'maximum registers / bytes of shared memory':90} {'kernels':>7} {archs}"]
    for family, members in sorted(families.items()):
        maxima = []
        for arch in ARCHS:
            of_arch = [kernel for kernel in members if kernel.arch == arch]
            maxima.append(f"{max(k.registers for k in of_arch)} / {max(k.shared for k in of_arch)}")
        lines.append(f"{family:90} {len(members) // len(ARCHS):7} {' '.join(f'{text:>12}' for text in maxima)}")
    lines.append(f"{len(kernels)} kernels, {sum(k.spills for k in kernels)} bytes spilled")
    record_property("table", "\n".join(lines))
    assert len(kernels) > 300
    spilling = [kernel for kernel in kernels if kernel.spills or kernel.stack]
    assert [kernel for kernel in spilling if not is_known_to_spill(kernel)] == []


# On some architectures ptxas spills a few registers of kernels with eight doubles, eight wide sums, or eight minima and
# maxima per thread, and of kernels that hold two rows and two sums of each of their values.
EXTREMES_OR_ROWS = r"reduce_columns<MomentsOp<\w+, true>|layer_norm_backward_rows<"
KNOWN_TO_SPILL = {
    "75": re.compile(r"reduce_columns<SumsOp<__half>"),
    "100": re.compile(EXTREMES_OR_ROWS),
    "120": re.compile(
        r"apply_columns<(Normalize|Inference)Op<double, true>, 8|reduce_columns<IntegerSumsOp<short>|"
        + EXTREMES_OR_ROWS
    ),
}


def is_known_to_spill(kernel: Kernel) -> bool:
    known = KNOWN_TO_SPILL.get(kernel.arch)
    return known is not None and known.match(kernel.name) is not None and kernel.stack <= 56


def test_every_architecture_has_every_kernel(kernels: list[Kernel]) -> None:
    of_arch = {arch: sorted(kernel.name for kernel in kernels if kernel.arch == arch) for arch in ARCHS}
    assert all(of_arch[arch] == of_arch[DISASSEMBLED] for arch in ARCHS)


@pytest.fixture(scope="session")
def code(objects: dict[tuple[str, str], tuple[Path, str]]) -> dict[str, Function]:
    """The machine code of every kernel whose vectors have at least 16 bytes."""
    found = [
        function
        for source in SOURCES
        for function in functions(tool("cuobjdump"), objects[source.stem, DISASSEMBLED][0])
    ]
    names = demangle([function.name for function in found])
    by_name = {names[function.name]: function for function in found}
    one_by_one = ("each_channel", "each_statistic", "response_")
    return {
        name: function
        for name, function in by_name.items()
        if not name.startswith(one_by_one) and access_bytes(name) >= 16
    }


def is_staged(name: str) -> bool:
    """Whether a kernel sums and applies from copies of its inputs in shared memory."""
    return name.startswith("normalize_staged") or (name.startswith("reduce_") and "NoApply" not in name)


def has_stage(name: str) -> bool:
    """Whether a kernel copies at least some of its inputs."""
    return is_staged(name) or name.startswith("persist_")


def test_vectors_are_read_by_one_instruction(code: dict[str, Function]) -> None:
    pattern = re.compile(r"LDG(STS)?\.E(\.[A-Z]+)*\.128")
    without = [name for name, function in code.items() if not any(map(pattern.search, function.instructions))]
    assert len(code) > 50
    assert without == []


def test_vectors_are_written_by_one_instruction(code: dict[str, Function]) -> None:
    """There are as many plain 16-byte stores as streaming ones, which are intrinsics that nvcc never splits."""
    plain, streaming = r"STG\.E\.128", r"STG\.E\.EF\.128"
    writing = {
        name: function for name, function in code.items() if name.startswith(("apply_", "layer_norm_", "normalize_"))
    }
    split = {
        name: (stores(function.instructions, plain), stores(function.instructions, streaming))
        for name, function in writing.items()
        if not 0 < stores(function.instructions, streaming) <= stores(function.instructions, plain)
    }
    assert len(writing) > 25
    assert split == {}
    # Pipelined and persistent launches only stream.
    streaming_only = [function for name, function in code.items() if name.startswith(("pipeline_", "persist_"))]
    assert len(streaming_only) == 30  # not fused training of doubles
    assert all(stores(function.instructions, streaming) >= 2 for function in streaming_only)


# Kernel families, the cache hint of their loads, and the minimum number in flight. Kernels of doubles or with three
# inputs have registers for fewer.
MIN_IN_FLIGHT = {
    r"reduce_rows<(MomentsOp|GradSumsOp<\w+, false)": ("", 4),
    r"reduce_rows<(SumsOp|GradSumsOp<\w+, true)": ("", 3),
    r"reduce_columns<(Moments|GradSums)Op<(float|__half|__nv_bfloat16|short)": ("", 6),
    r"reduce_columns<(SumsOp|\w+<(double|int|long))": ("", 3),
    r"pipeline_rows<(MomentsOp|GradSumsOp<\w+, false)": ("", 4),
    r"pipeline_rows<GradSumsOp<\w+, true": ("", 3),
    r"pipeline_rows<": (".EF", 4),
    r"persist_columns<(Moments|GradSums)Op<(float|__half|__nv_bfloat16)": ("", 6),
    r"persist_columns<": (".EF", 3),
    r"apply_columns<GradInputOp<\w+, true": (".EF", 3),
    r"apply_(?!columns<GradInputOp<\w+, true)": (".EF", 4),
    r"normalize_rows<.*, \d+, (4|8)>$": ("", 4),
    r"layer_norm_backward_rows<\w+, \d+, (2|4)": ("", 4),
}


@pytest.mark.parametrize("family", MIN_IN_FLIGHT)
def test_loads_are_in_flight_together(
    code: dict[str, Function], family: str, record_property: Callable[[str, str], None]
) -> None:
    how, minimum = MIN_IN_FLIGHT[family]
    in_flight = {
        name: loads_in_flight(f.instructions, how)
        for name, f in code.items()
        if re.match(family, name) and not is_staged(name)
    }
    record_property("table", "\n".join(f"{loads} {name}" for name, loads in sorted(in_flight.items())))
    assert len(in_flight) >= 4
    assert {name: loads for name, loads in in_flight.items() if loads < minimum} == {}


def test_all_copies_are_in_flight_together(code: dict[str, Function]) -> None:
    """The loops that start copies of vectors do not wait, and no copy is narrower than 16 bytes."""
    staged = {name: function for name, function in code.items() if has_stage(name)}
    assert len(staged) > 40
    for name, function in staged.items():
        copies = [text for text in function.instructions if "LDGSTS" in text]
        assert copies, name
        assert all(".BYPASS.128" in text for text in copies), name
        loops = [loop for loop in innermost_loops(function) if any("LDGSTS" in text for text in loop)]
        assert not any(re.search(r"\bDEPBAR|BAR\.SYNC", text) for loop in loops for text in loop), name


def test_staged_kernels_declare_what_their_plan_assumes(kernels: list[Kernel]) -> None:
    """Besides dynamic shared memory; the constants are those of plan.cpp and column_state_bytes()."""
    staged = [kernel for kernel in kernels if has_stage(kernel.name)]
    assert len(staged) > 40 * len(ARCHS)
    for kernel in staged:
        values = re.search(r", (\d+)(?:, (?:true|false))?>$", kernel.name)
        assert values is not None, kernel.name
        number = 8 if "Op<double" in kernel.name else 4
        states = 256 * int(values[1]) * 5 * number if "_columns<" in kernel.name else 0
        assert kernel.shared <= (4 << 10) + states, kernel


def test_activations_of_16_bits_call_nothing(code: dict[str, Function]) -> None:
    """A correctly rounded division calls a subroutine for rare cases; the approximations do not."""
    pattern = re.compile(r"apply_\w+<NormalizeOp<(__half|__nv_bfloat16), true")
    fused = {name: function for name, function in code.items() if pattern.match(name)}
    assert len(fused) == 6
    calling = [name for name, function in fused.items() if any("CALL." in text for text in function.instructions)]
    assert calling == []


def test_loads_wait_for_no_division(code: dict[str, Function]) -> None:
    """A 64-bit division is a call of some hundred cycles."""
    assert [name for name, function in code.items() if divides_before_it_loads(function)] == []


def test_launches_overlap(code: dict[str, Function]) -> None:
    """A reduction allows the next launch before its first load; an application waits before its first memory access."""
    reducing = {name: function for name, function in code.items() if name.startswith("reduce_")}
    applying = {name: function for name, function in code.items() if name.startswith("apply_")}
    assert len(reducing) > 25
    assert len(applying) > 25

    def follows_an_access(function: Function, instruction: str) -> bool:
        text = function.instructions
        first = next((i for i, line in enumerate(text) if re.search(r"\b(LD|LDG|ST|STG|RED|ATOM\w*)\b", line)), 0)
        return not any(instruction in line for line in text[:first])

    assert [name for name, function in reducing.items() if follows_an_access(function, "PREEXIT")] == []
    assert [name for name, function in applying.items() if follows_an_access(function, "ACQBULK")] == []


def test_recomputing_keeps_loads_in_flight(code: dict[str, Function]) -> None:
    """The loops that recompute a channel in double contain no call of a division."""
    # Their other loops sum in float, unless they merge channels by group.
    pattern = re.compile(r"reduce_\w+<MomentsOp<(float|__half|__nv_bfloat16), \w+>, (?!FinishGroup)")
    recomputing = {name: function for name, function in code.items() if pattern.match(name)}
    assert len(recomputing) >= 15
    for name, function in recomputing.items():
        loops = [
            loop
            for loop in innermost_loops(function)
            if any("LDG" in text for text in loop) and any(re.search("DADD|DFMA", text) for text in loop)
        ]
        assert not any("CALL" in text for loop in loops for text in loop), name
        # One loop for the sum, one for the squares; a third merges the partial sums.
        assert sum(sum("LDG" in text for text in loop) >= 8 for loop in loops) >= 3, name


def access_bytes(name: str) -> int:
    """The bytes of a vector of the kernel's first input, from the kernel's name."""
    sizes = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2, "unsigned char": 1, "signed char": 1}
    sizes |= {"short": 2, "int": 4, "long": 8}
    item = re.search(r"(?:Op|_tiles|norm_\w+|add_residuals)<([a-z_0-9 ]+)[,>]", name)
    vectors = r"(?:normalize_rows<.*|norm_backward_rows<\w+), (\d+), \d+>$"  # the values and the number of vectors
    values = re.search(vectors, name) or re.search(r", (\d+)(?:, (?:true|false))?>$", name)
    assert item is not None, name
    assert values is not None, name
    return sizes[item[1]] * int(values[1])


def test_sources_that_include_torch_compile(folder: Path) -> None:
    """With a substitute for the one header that a CPU build of torch lacks."""
    tool("nvcc")
    generated = folder / "c10/cuda/impl/cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    include = [*cpp_extension.include_paths(), sysconfig.get_path("include"), str(home / "include")]
    if not Path(include[0], "c10/cuda/impl/cuda_cmake_macros.h").exists():
        include.append(str(folder))
    standard = "-std=c++20" if torch.__version__ >= "2.12" else "-std=c++17"
    flags = [standard, "-Wall", "-Wextra", "-Werror", "-DNORMFUSED_WITH_CUDA=1", "-DTORCH_EXTENSION_NAME=_C"]
    flags += [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in include), "-c"]
    compiler = os.environ.get("CXX", "c++")
    sources = [path for path in (ROOT / "csrc").glob("**/*.cpp") if "kernels" not in path.parts]
    assert ROOT / "csrc/ops/cuda/backend.cpp" in sources

    def compile_one(source: Path) -> str:
        # An object, although only errors matter: ccache keeps objects.
        command = [compiler, *flags, str(source), "-o", str(folder / f"{source.stem}.o")]
        return subprocess.run(command, capture_output=True, text=True).stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert list(pool.map(compile_one, sources)) == [""] * len(sources)
