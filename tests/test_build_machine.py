"""What a build detects on its machine: CUDA toolkit, number of compilers that may run at once, their flags."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "build_backend"))
import cuda_toolkit
import jobs
from cuda_toolkit import Search, find_toolkit
from cxx_flags import family_of, flags_of


@pytest.fixture(autouse=True)
def system_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The substitute for /usr/local/cuda, initially empty."""
    monkeypatch.setattr(cuda_toolkit, "SYSTEM_HOME", tmp_path / "system")
    return tmp_path / "system"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


def toolkit(
    home: Path,
    release: str = "13.0",
    include: str | None = "include",
    lib: str | None = "lib64",
    says: str = "",
    prints_variables: bool = True,
) -> Path:
    """A folder like that of a toolkit. Its nvcc prints the same as NVIDIA's. Relative folders are below ``home``."""
    variables = f"#\\$ TOP={home}/bin/..\n{says}" if prints_variables else "nvcc fatal : no gcc"
    script(
        home / "bin" / "nvcc",
        f"""case "$*" in
*--version*) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
*--list-gpu-arch*) printf "compute_75\\ncompute_90\\ncompute_100\\n" ;;
*--dryrun*) printf "%b" "{variables}" >&2 ;;
esac
""",
    )
    if include is not None:
        (home / include).mkdir(parents=True, exist_ok=True)
        (home / include / "cuda_runtime.h").touch()
    if lib is not None:
        (home / lib).mkdir(parents=True, exist_ok=True)
        (home / lib / f"libcudart.so.{release.split('.')[0]}").touch()
    return home


def find(tmp_path: Path, major: str = "13", path: str = "", **environ: str) -> Search:
    return find_toolkit({"PATH": path, **environ}, major, tmp_path / "site-packages")


def test_the_toolkit_of_cuda_home(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        found, problems = find(tmp_path, **{name: str(home)})
        assert problems == []
        assert found is not None
        assert found.home == home
        assert found.version == "13.0"
        assert found.include == home / "include"
        assert found.cudart == home / "lib64" / "libcudart.so.13"
        assert found.architectures == {"7.5", "9.0", "10.0"}


def test_a_script_elsewhere_that_calls_nvcc(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda")
    script(tmp_path / "usr" / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"\n')
    found, problems = find(tmp_path, path=str(tmp_path / "usr" / "bin"))
    assert problems == []
    assert found is not None
    assert found.home == home


def test_a_link_elsewhere_to_an_nvcc_that_prints_no_variables(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda", prints_variables=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    found, _ = find(tmp_path, path=str(tmp_path / "bin"))
    assert found is not None
    assert found.home == home


def test_headers_and_libraries_in_the_folders_that_nvcc_names(tmp_path: Path) -> None:
    """conda has them below targets/, distributions in separate folders."""
    elsewhere = tmp_path / "else where"
    says = (
        f'#\\$ INCLUDES=\\"-I{elsewhere}/inc\\"  \\n'
        f'#\\$ LIBRARIES=  \\"-L{elsewhere}/lib/stubs\\" \\"-L{elsewhere}/lib\\"\\n'
    )
    home = toolkit(tmp_path / "cuda", include=None, lib=None, says="\\n" + says)
    (elsewhere / "inc").mkdir(parents=True)
    (elsewhere / "inc" / "cuda_runtime.h").touch()
    for folder in ("lib", "lib/stubs"):
        (elsewhere / folder).mkdir()
        (elsewhere / folder / "libcudart.so.13").touch()
    found, problems = find(tmp_path, CUDA_HOME=str(home))
    assert problems == []
    assert found is not None
    assert found.include == elsewhere / "inc"
    assert found.cudart == elsewhere / "lib" / "libcudart.so.13"


@pytest.mark.parametrize("nvcc_too", [True, False])
def test_wheels(tmp_path: Path, nvcc_too: bool) -> None:
    """torch's wheels contain headers and the library; nvcc comes from another wheel, or from elsewhere."""
    wheels = toolkit(tmp_path / "site-packages" / "nvidia" / "cu13", lib="lib")
    home = wheels
    if not nvcc_too:
        (wheels / "bin" / "nvcc").unlink()
        home = toolkit(tmp_path / "cuda", include=None, lib=None)
    found, problems = find(tmp_path, path=str(home / "bin"))
    assert problems == []
    assert found is not None
    assert (found.home, found.include) == (home, wheels / "include")
    assert found.cudart == wheels / "lib" / "libcudart.so.13"


def test_wrong_cuda_home(tmp_path: Path, system_home: Path) -> None:
    toolkit(system_home)
    found, problems = find(tmp_path, CUDA_HOME="/nowhere")
    assert found is not None
    assert found.home == system_home
    assert problems == ["no nvcc in CUDA_HOME=/nowhere"]


def test_another_major_version_is_used_only_if_none_matches(tmp_path: Path, system_home: Path) -> None:
    old = toolkit(tmp_path / "old", "12.4")
    found, _ = find(tmp_path, path=str(old / "bin"))
    assert found is not None
    assert (found.home, found.version) == (old, "12.4")
    toolkit(system_home)
    found, _ = find(tmp_path, path=str(old / "bin"))
    assert found is not None
    assert (found.home, found.version) == (system_home, "13.0")


def test_no_toolkit_is_found(tmp_path: Path, system_home: Path) -> None:
    found, problems = find(tmp_path, path="/no/bin", CUDA_HOME="/nowhere")
    assert found is None
    wheels = tmp_path / "site-packages" / "nvidia" / "cu13"
    assert problems == [f"no nvcc in CUDA_HOME=/nowhere, PATH, {system_home}, {wheels}"]


@pytest.mark.parametrize("missing", ["cuda_runtime.h", "libcudart.so.13"])
def test_incomplete_toolkit(tmp_path: Path, missing: str) -> None:
    header = missing == "cuda_runtime.h"
    home = toolkit(tmp_path / "cuda", include=None if header else "include", lib=None if not header else "lib")
    found, problems = find(tmp_path, CUDA_HOME=str(home))
    assert found is None
    assert problems[0].startswith(
        f"nvcc 13.0 of {home}, but no {missing} in {home}/{'include' if header else 'lib64'}, "
    )
    assert f"{tmp_path}/site-packages/nvidia/cu13" in problems[0]


@pytest.mark.parametrize("text", ["exit 3\n", "echo what\n"])
def test_nvcc_that_does_not_work(tmp_path: Path, text: str) -> None:
    nvcc = script(tmp_path / "cuda" / "bin" / "nvcc", text)
    found, problems = find(tmp_path, CUDA_HOME=str(tmp_path / "cuda"))
    assert found is None
    assert problems[0] == f"{nvcc} --version names no release"


# ---- number of compilers ---------------------------------------------------------------------------------------------


def machine(root: Path, cgroup: str, **files: str) -> Path:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 16),
        ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n"}, 16),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "450000 100000\n"}, 4),
        ("0::/a/b\n", {"a/memory.max": str(11 * 2**30)}, 5),
        ("0::/a\n", {"memory.max": str(2**30)}, 1),
        ("0::/../../host\n", {"cpu.max": "50000 100000\n"}, 1),
        ("4:memory:/x\n2:cpu,cpuacct:/\n", {"memory/x/memory.limit_in_bytes": str(6 * 2**30)}, 3),
        (
            "4:memory:/x\n2:cpu,cpuacct:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
    ],
)
def test_jobs_obey_the_limits_of_a_container(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_cores", lambda: 16)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**24}[name])
    assert jobs.default_jobs(machine(tmp_path, cgroup, **files)) == expected


def test_jobs_where_the_system_has_neither_cgroups_nor_sysconf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert jobs.default_jobs(tmp_path) == 1


# ---- flags of the C++ compiler ---------------------------------------------------------------------------------------

GCC = "c++ (Debian 12.2.0-14) 12.2.0\nCopyright (C) 2022 Free Software Foundation, Inc.\n"
CLANG = "Debian clang version 16.0.6\nTarget: x86_64-pc-linux-gnu\n"
APPLE = "Apple clang version 15.0.0 (clang-1500.3.9.4)\nTarget: arm64-apple-darwin23.4.0\n"
OTHER = "Intel(R) oneAPI DPC++/C++ Compiler 2025.0.0\n"


@pytest.mark.parametrize(
    ("command", "version", "family"),
    [
        ("c++", GCC, "gcc"),
        ("/usr/bin/g++-12", GCC, "gcc"),
        ("c++", CLANG, "clang"),
        ("c++", APPLE, "clang"),
        (r"C:\LLVM\bin\clang-cl.exe", CLANG, "clang-cl"),
        ("clang-cl-19", CLANG, "clang-cl"),
        ("cl", "", "cl"),
        (r"C:\VC\bin\CL.EXE", "", "cl"),
        ("icpx", OTHER, "unknown"),
        ("missing", "", "unknown"),
    ],
)
def test_family_of_a_compiler(command: str, version: str, family: str) -> None:
    assert family_of(command, version) == family


OPTIMIZATION = ["-O3", "-fno-math-errno", "-g0", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra"]


@pytest.mark.parametrize(
    ("platform", "family", "has_omp_header", "compile", "werror", "system_include", "warning"),
    [
        (
            *("linux", "gcc", False, [*OPTIMIZATION, "-fopenmp", *WARNINGS, "-Wno-stringop-overflow"]),
            *("-Werror", "-isystem", ""),
        ),
        (
            *("linux", "clang", True, [*OPTIMIZATION, *WARNINGS], "-Werror", "-isystem"),
            "the CPU kernels will run on one thread: torch's OpenMP runtime on Linux is GCC's; set CXX=g++",
        ),
        (
            *("darwin", "clang", True, [*OPTIMIZATION, "-Xclang", "-fopenmp", *WARNINGS]),
            *("-Werror", "-isystem", ""),
        ),
        (
            *("darwin", "clang", False, [*OPTIMIZATION, *WARNINGS], "-Werror", "-isystem"),
            "the CPU kernels will run on one thread: torch's headers have no omp.h",
        ),
        (
            *("win32", "clang-cl", True, ["/O2", "/clang:-O3", "/clang:-fno-math-errno", "/W4"], "/WX", "-imsvc"),
            "the CPU kernels will run on one thread: OpenMP of clang-cl would load a second runtime",
        ),
    ],
    ids=["linux-gcc", "linux-clang", "macos", "macos-without-omp.h", "windows"],
)
def test_flags_of_a_platform(
    platform: str,
    family: str,
    has_omp_header: bool,
    compile: list[str],
    werror: str,
    system_include: str,
    warning: str,
) -> None:
    assert flags_of(platform, family, has_omp_header) == (compile, werror, system_include, warning)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("/nowhere/c++ -O1", "the C++ compiler '/nowhere/c++' was not found"), (" ", "CXX is empty")],
)
def test_a_build_without_a_compiler_stops_with_the_remedy(tmp_path: Path, compiler: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "CXX": compiler},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"normfused: {message}" in done.stderr
    assert "set CXX" in done.stderr or "set it to" in done.stderr
    assert "ninja" not in done.stdout + done.stderr


@pytest.mark.parametrize("family", ["cl", "gcc", "clang", "unknown"])
def test_windows_needs_clang_cl(family: str) -> None:
    with pytest.raises(RuntimeError, match="install LLVM, set CXX=clang-cl, then reinstall normfused"):
        flags_of("win32", family, False)


@pytest.mark.parametrize(
    ("platform", "options"),
    [
        ("linux", ["--driver-mode=g++", "--target=x86_64-linux-gnu"]),
        ("darwin", ["--driver-mode=g++", "--target=arm64-apple-macos11"]),
        ("win32", ["--driver-mode=cl", "--target=x86_64-pc-windows-msvc"]),
    ],
)
def test_clang_understands_the_flags(tmp_path: Path, platform: str, options: list[str]) -> None:
    """Clang's driver for another system names the flags that it does not know or use; -### compiles nothing."""
    clang = next(filter(None, map(shutil.which, ["clang++", *(f"clang++-{n}" for n in range(30, 13, -1))])), None)
    if clang is None:
        pytest.skip("no clang++")
    flags = flags_of(platform, "clang-cl" if platform == "win32" else "clang", True)
    source = tmp_path / "x.cpp"
    source.touch()
    command = [clang, *options, *flags.compile, flags.werror, flags.system_include + str(tmp_path), "-c", str(source)]
    done = subprocess.run([*command, "-###"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning:" not in done.stderr
    frontend = done.stderr.splitlines()[-1]
    assert all(f'"{flag}"' in frontend for flag in ("-O3", "-Werror")), frontend
    assert "-fmath-errno" not in frontend
    assert str(tmp_path) in frontend
