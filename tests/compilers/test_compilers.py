"""Compilers and platforms: the C++ code that needs no torch builds without warnings, and results have the same bits."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from matrix import COMPILERS, INCLUDE, KERNELS, LIGHT, PLANS, ROOT, Compiler, check_portable, compile_sources, output_of

sys.path.insert(0, str(ROOT / "tests/cpu_kernels"))
from test_cpu_kernels import PLANS as EXPECTED_PLANS


@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda compiler: f"{compiler.name}-{compiler.platform}")
def test_sources_build_and_results_are_the_same(compiler: Compiler, tmp_path: Path) -> None:
    """Without the kernels, which ``matrix.py --kernels`` builds and tests."""
    if missing := compiler.missing():
        pytest.skip(f"no {missing}")
    compile_sources(compiler, [source for source in LIGHT if source not in KERNELS], tmp_path)
    if compiler.why_not_run() is None:
        check_portable(compiler, tmp_path)
        assert output_of(compiler, PLANS, tmp_path).replace("\r\n", "\n") == EXPECTED_PLANS


@pytest.mark.parametrize("name", ["g++", "clang++-16"])
def test_statistics_of_ranks_are_merged_without_fused_multiply_add(name: str, tmp_path: Path) -> None:
    """Even if the compiler may use it everywhere. A fused multiply-add rounds once, so other machines would differ."""
    compiler = shutil.which(name)
    if compiler is None:
        pytest.skip(f"no {name}")
    target = tmp_path / "merge_ranks.s"
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-march=haswell", *INCLUDE, "-S"]
    subprocess.run([compiler, *flags, ROOT / "csrc/kernels/cpu/merge_ranks.cpp", "-o", target], check=True)
    text = target.read_text()
    assert re.search(r"\bvmulsd\b|\bvmulpd\b", text)
    assert re.findall(r"\bvfn?m(?:add|sub)\w+", text) == []
