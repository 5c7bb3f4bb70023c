"""What nvcc makes of the CUDA sources, where there is an nvcc; no GPU is needed.

Every kernel, for every architecture that is shipped: no warning, no spill, no stack frame, and 16-byte accesses where
the kernel was made for them. What faces torch compiles too.
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
ARCHS = ("80", "90", "100")

sys.path.insert(0, str(ROOT / "build_backend"))
from extension import NVCC_FLAGS  # noqa: E402


class Kernel(NamedTuple):
    arch: str
    name: str
    registers: int
    shared: int
    stack: int
    spills: int

    def family(self) -> str:
        """Its template and its operations, without their types."""
        return re.sub(
            r"\b(float|double|__half|__nv_bfloat16|unsigned char|signed char|short|int|long)\b", "T", self.name
        )


def tool(name: str) -> str:
    """From the toolkit, or from the wheels of the test extra."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", f"{sysconfig.get_path('purelib')}/nvidia/cu13"]
    for path in [shutil.which(name), *(f"{home}/bin/{name}" for home in homes if home)]:
        if path and os.access(path, os.X_OK):
            return path
    pytest.skip(f"no {name}")


def demangle(names: list[str]) -> dict[str, str]:
    filtered = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = filtered.replace("normfused::cuda::", "").replace("(anonymous namespace)::", "")
    # Template arguments say all; the parameters follow from them.
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
    """The object of each source for each architecture, and what the compiler said."""
    nvcc, folder = tool("nvcc"), tmp_path_factory.mktemp("cuda_build")
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]

    def compile_one(task: tuple[Path, str]) -> tuple[Path, str]:
        source, arch = task
        target = folder / f"{source.stem}.{arch}.o"
        code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [nvcc, *NVCC_FLAGS, *strict, code, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target)]
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
    lines = [f"{'at most: registers / bytes of shared memory':90} {'kernels':>7} {archs}"]
    for family, members in sorted(families.items()):
        most = []
        for arch in ARCHS:
            of_arch = [kernel for kernel in members if kernel.arch == arch]
            most.append(f"{max(k.registers for k in of_arch)} / {max(k.shared for k in of_arch)}")
        lines.append(f"{family:90} {len(members) // len(ARCHS):7} {' '.join(f'{text:>12}' for text in most)}")
    lines.append(f"{len(kernels)} kernels, {sum(k.spills for k in kernels)} bytes spilled")
    record_property("table", "\n".join(lines))
    assert len(kernels) > 300
    assert [kernel for kernel in kernels if kernel.spills or kernel.stack] == []


def test_every_architecture_has_every_kernel(kernels: list[Kernel]) -> None:
    of_arch = {arch: sorted(kernel.name for kernel in kernels if kernel.arch == arch) for arch in ARCHS}
    assert of_arch["80"] == of_arch["90"] == of_arch["100"]


@pytest.mark.parametrize("arch", ARCHS)
def test_vectors_are_read_by_one_instruction(objects: dict[tuple[str, str], tuple[Path, str]], arch: str) -> None:
    """LDG.E.128 in each kernel whose vectors are 16 bytes."""
    cuobjdump = tool("cuobjdump")
    without, seen = [], 0
    for source in SOURCES:
        path, _ = objects[source.stem, arch]
        sass = subprocess.run([cuobjdump, "-sass", path], capture_output=True, text=True, check=True).stdout
        functions = re.split(r"Function : ", sass)[1:]
        names = demangle([function.split(None, 1)[0] for function in functions])
        for function in functions:
            name = names[function.split(None, 1)[0]]
            if name.startswith(("each_channel", "response_")):  # values one by one
                continue
            width = access_bytes(name)
            if width < 16:
                continue
            seen += 1
            if not re.search(r"LDG\.E(\.[A-Z]+)*\.128", function):
                without.append(name)
    assert seen > 50
    assert without == []


def innermost_loops(function: str) -> list[list[str]]:
    """The instructions of each loop in which there is no other."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", function)]
    jumps = [(int(to[1], 16), at) for at, text in code if (to := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]
    loops = [(first, last) for first, last in jumps if first < last]
    return [
        [text for at, text in code if first <= at <= last]
        for first, last in loops
        if not any((first, last) != (a, b) and first <= a and b <= last for a, b in loops)
    ]


@pytest.mark.parametrize("arch", ARCHS)
def test_repairs_keep_loads_in_flight(objects: dict[tuple[str, str], tuple[Path, str]], arch: str) -> None:
    """A channel that is computed again in double is read without a division for each value, which is a call."""
    cuobjdump = tool("cuobjdump")
    seen = 0
    for stem in ("channel_stats", "ranks"):
        sass = subprocess.run(
            [cuobjdump, "-sass", objects[stem, arch][0]], capture_output=True, text=True, check=True
        ).stdout
        functions = re.split(r"Function : ", sass)[1:]
        names = demangle([function.split(None, 1)[0] for function in functions])
        for function in functions:
            name = names[function.split(None, 1)[0]]
            if not re.search(r"MomentsOp<(float|__half|__nv_bfloat16),", name):  # which sum in float otherwise
                continue
            loops = [
                loop
                for loop in innermost_loops(function)
                if any("LDG" in text for text in loop) and any(re.search("DADD|DFMA", text) for text in loop)
            ]
            seen += 1
            assert not any("CALL" in text for loop in loops for text in loop), name
            # Of the sum and of the squares; another, with as many, reads the partial results.
            assert sum(sum("LDG" in text for text in loop) >= 8 for loop in loops) >= 3, name
    assert seen >= 30


def access_bytes(name: str) -> int:
    """Bytes of a vector of the first input of a kernel, from its name."""
    sizes = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2, "unsigned char": 1, "signed char": 1}
    sizes |= {"short": 2, "int": 4, "long": 8}
    item = re.search(r"(?:Op|_tiles)<([a-z_0-9 ]+)[,>]", name)
    values = re.search(r", (\d+)(?:, (?:true|false))?>$", name)
    assert item is not None, name
    assert values is not None, name
    return sizes[item[1]] * int(values[1])


def test_what_faces_torch_compiles(tmp_path: Path) -> None:
    """With the one header that a CPU build of torch lacks."""
    tool("nvcc")
    generated = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    include = [*cpp_extension.include_paths(), sysconfig.get_path("include"), str(home / "include")]
    if not Path(include[0], "c10/cuda/impl/cuda_cmake_macros.h").exists():
        include.append(str(tmp_path))
    standard = "-std=c++20" if torch.__version__ >= "2.12" else "-std=c++17"
    flags = [standard, "-Wall", "-Wextra", "-Werror", "-DNORMFUSED_WITH_CUDA=1", "-DTORCH_EXTENSION_NAME=_C"]
    flags += [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in include), "-fsyntax-only"]
    compiler = os.environ.get("CXX", "c++")
    sources = [path for path in (ROOT / "csrc").glob("**/*.cpp") if "kernels" not in path.parts]
    assert ROOT / "csrc/ops/cuda/backend.cpp" in sources

    def compile_one(source: Path) -> str:
        return subprocess.run([compiler, *flags, str(source)], capture_output=True, text=True).stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert list(pool.map(compile_one, sources)) == [""] * len(sources)
