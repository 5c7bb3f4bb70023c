"""The operators' CPU tests with the CUDA kernels in place of the CPU kernels: autograd, accuracy, layouts, errors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from host_build import HERE, KERNELS, LAUNCHERS, ROOT, build, gcc
from torch.utils import cpp_extension

import normfused

SOURCES = [
    HERE / "backend.cpp",
    ROOT / "csrc/binding.cpp",
    *sorted((ROOT / "csrc/memory").glob("*.cpp")),
    *(path for path in sorted((ROOT / "csrc/ops").glob("*.cpp")) if path.name != "cpu_backend.cpp"),
    ROOT / "csrc/kernels/cpu/value_counts.cpp",  # not an operator: there is no CUDA kernel of it
    *LAUNCHERS,
    KERNELS / "traffic.cpp",
]
SUITES = [
    "exact/test_exact_batch_norm.py",
    "exact/test_exact_channel_stats.py",
    "exact/test_exact_group_norm.py",
    "exact/test_exact_layer_norm.py",
    "test_batch_norm.py",
    "test_channel_stats.py",
    "test_group_norm.py",
    "test_inplace.py",
    "test_layer_norm.py",
    "test_layer_norm_layers.py",
    "test_local_response_norm.py",
    "test_modules.py",
    "test_numerics.py",
    "test_ranks.py",
    "test_standardize.py",
]
MORE_SUITES = ["test_fused.py", "test_masks.py", "test_negated_views.py"]
# The CUDA kernels sum deviations from a mean of several values, which is exact if their number is a power of two.
INEXACT = [
    "tests/exact/test_exact_channel_stats.py::test_channel_stats[float32]",
    "tests/exact/test_exact_group_norm.py::test_divided_groups[float64-(2, 3, 3, 30)]",
]


@pytest.fixture(scope="module")
def package(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of normfused whose extension runs the CUDA kernels in the simulator."""
    include = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    flags = "-O1 -DNDEBUG -fPIC -fopenmp -shared -Wno-stringop-overflow -DTORCH_EXTENSION_NAME=_C "
    flags += "-DTORCH_API_INCLUDE_EXTENSION_H "
    flags += " ".join(f"-isystem {path}" for path in include)
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    extension = build(cache, gcc(), flags, SOURCES, link=libraries)
    folder = tmp_path_factory.mktemp("package")
    copy = folder / "normfused"
    shutil.copytree(Path(normfused.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(extension, copy / f"_C{EXTENSION_SUFFIXES[0]}")
    return folder


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize(
    ("suites", "least"),
    [pytest.param(SUITES, 3900, id="most"), pytest.param(MORE_SUITES, 800, marks=pytest.mark.nightly, id="more")],
)
def test_operators_pass_their_tests_with_cuda_kernels(
    suites: list[str], least: int, package: Path, record_property: Callable[[str, str], None]
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(package), "NORMFUSED_STRICT": "1"}
    probe = "import normfused; print(normfused.info()['cpu_capability'])"
    ran = subprocess.run(
        [sys.executable, "-c", probe], env=environment, capture_output=True, text=True, cwd=package, check=True
    )
    assert ran.stdout.strip() == "cuda", ran.stdout
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not cuda and not many_values"]
    command += [f"--deselect={test}" for test in INEXACT]
    done = subprocess.run(
        [*command, *(str(ROOT / "tests" / suite) for suite in suites)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=package,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > least, done.stdout[-300:]
    record_property("table", f"{passed[1]} tests of the operators passed with the CUDA kernels")
