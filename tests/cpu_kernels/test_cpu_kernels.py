"""The CPU kernels without torch, for each instruction set, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADDRESS = ["-std=c++17", "-g1", "-fsanitize=address", "-fno-sanitize-recover=all"]
FLAGS = [*ADDRESS, "-fsanitize=undefined"]
# In the kernels, checks are function calls: with inlined checks the force-inlined templates take minutes to compile.
KERNEL_FLAGS = ["-O1", "--param", "asan-instrumentation-with-call-threshold=0"]
# The other instruction sets compile the same templates. With this sanitizer they take more than twice as long.
UNDEFINED_ONLY_IN_BASELINE = {"avx2", "avx512"}
CAPABILITIES = ["baseline", "avx512", "avx2"]  # the slowest first


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    build = tmp_path_factory.mktemp("cpu_kernels")
    kernels = [path for path in (ROOT / "csrc/kernels/cpu").glob("*.cpp") if path.name != "nontemporal.cpp"]
    # The baseline takes longest, so it is first.
    sources = [*sorted(kernels, key=lambda path: path.stem != "baseline"), Path(__file__).with_name("main.cpp")]
    objects = [build / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/kernels'}"]
        sanitizers = ADDRESS if source.stem in UNDEFINED_ONLY_IN_BASELINE else FLAGS
        level = ["-O2"] if source.name == "main.cpp" else KERNEL_FLAGS
        subprocess.run([compiler, *sanitizers, *level, *include, "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    subprocess.run([compiler, *FLAGS, *objects, "-o", build / "driver", "-lpthread"], check=True)
    return build / "driver"


@pytest.fixture(scope="session")
def runs(driver: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """The result of each instruction set."""

    def run(capability: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "NORMFUSED_CPU_CAPABILITY": capability}
        return subprocess.run([driver], env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(CAPABILITIES, pool.map(run, CAPABILITIES), strict=True))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_match_their_definition_and_stay_in_bounds(
    runs: dict[str, subprocess.CompletedProcess[str]], capability: str
) -> None:
    run = runs[capability]
    assert run.returncode == 0, run.stdout + run.stderr
    ran = run.stdout.split(":")[0]
    if ran != capability:
        pytest.skip(f"this machine supports {ran} at most")
    print(run.stdout)


PLANS = """\
rows 1, 49: 64 statistics, 1 x 1 parts of 1 x 49
rows 10, 4096: 1 statistics, 1 x 1 parts of 10 x 4096
rows 4, 65536: 1 statistics, 4 x 2 parts of 1 x 32768
rows 2, 1048576: 1 statistics, 2 x 32 parts of 1 x 32768
columns 49, 16: 16 statistics, 1 x 1 parts of 1 x 49
columns 1024, 80: 4 statistics, 1 x 1 parts of 1 x 1024
columns 4096, 40: 32 statistics, 1 x 32 parts of 1 x 128
columns 65536, 16: 32 statistics, 1 x 32 parts of 1 x 2048
columns 256, 160: 2 statistics, 1 x 1 parts of 1 x 256
columns 7, 32768: 1 statistics, 1 x 1 parts of 1 x 7
layer rows 1, 4: 64 statistics, 1 x 1 parts of 1 x 1
layer rows 64, 4: 64 statistics, 1 x 1 parts of 1 x 64
layer rows 768, 2: 12 statistics, 1 x 1 parts of 1 x 768
layer rows 768, 4: 8 statistics, 1 x 1 parts of 1 x 768
layer rows 4096, 4: 4 statistics, 1 x 1 parts of 1 x 4096
layer rows 65536, 4: 1 statistics, 1 x 1 parts of 1 x 65536
layer rows 200000, 4: 1 statistics, 1 x 6 parts of 1 x 33344
layer columns 96, 3136: blocks of 832
layer columns 384, 196: blocks of 256
layer columns 768, 49: blocks of 64
layer columns 100000, 1024: blocks of 64
chunks 3, 512: 1 of 3
chunks 64, 32768: 4 of 16
chunks 4096, 6144: 64 of 64
chunks 100352, 768: 64 of 1568
"""


def test_plans_depend_on_the_shape_of_a_sample_only(tmp_path: Path) -> None:
    """The table of the plans of group, instance, layer and RMS norm. None of them is given the number of samples."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = [Path(__file__).with_name("plans.cpp"), ROOT / "csrc/kernels/cpu/plan.cpp"]
    command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", *sources, "-o", tmp_path / "plans"]
    subprocess.run(command, check=True)
    assert subprocess.run([tmp_path / "plans"], capture_output=True, text=True, check=True).stdout == PLANS


@pytest.mark.parametrize("capability", ["avx512", "avx2"])
def test_wide_instructions_stay_in_their_own_functions(tmp_path: Path, capability: str) -> None:
    """No weak symbols: the linker could use one of them for the whole library, on any CPU."""
    compiler, nm = shutil.which(os.environ.get("CXX", "c++")), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("no C++ compiler or no nm")
    source, target = ROOT / f"csrc/kernels/cpu/{capability}.cpp", tmp_path / "kernels.o"
    flags = ["-std=c++17", "-O3", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, "-c", source, "-o", target], check=True)
    symbols = subprocess.run([nm, "-C", target], capture_output=True, text=True, check=True).stdout.splitlines()
    assert any(" t normfused::cpu::" in line or " T normfused::cpu::" in line for line in symbols)
    assert [line for line in symbols if " W " in line] == []


def test_every_inl_file_parses_alone() -> None:
    """As clangd parses it: with the flags of .clangd and without the file that includes it."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("no C++ compiler, or not an x86-64 machine")
    added = re.search(r"\.inl\nCompileFlags:\n  Add: \[(.*)\]", (ROOT / ".clangd").read_text())
    assert added is not None
    command = [compiler, *added[1].split(", "), "-fsyntax-only", f"-I{ROOT / 'csrc'}"]
    files = sorted((ROOT / "csrc/kernels/cpu").glob("*.inl"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(lambda file: subprocess.run([*command, file], capture_output=True, text=True), files)
    failed = {file.name: run.stderr for file, run in zip(files, runs, strict=True) if run.returncode != 0}
    assert files
    assert not failed, "\n".join(failed.values())
