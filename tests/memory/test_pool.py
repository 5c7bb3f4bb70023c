"""The memory pool without torch: its policy against a simulated system, and threads on real memory with sanitizers."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


def compiled(folder: Path, source: str, *flags: str) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = folder / source
    sources = [Path(__file__).with_name(f"{source}.cpp"), *sorted((ROOT / "csrc/memory").glob("*.cpp"))]
    command = [compiler, "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", *flags]
    subprocess.run([*command, *sources, "-o", program, "-lpthread"], check=True)
    return program


def test_policy_against_a_simulated_system(tmp_path: Path, record_property: Callable[[str, str], None]) -> None:
    """One owner per page, the bounds at every moment, memory returned when idle: scenarios and 100 simulated hours."""
    # AddressSanitizer would mark the simulated addresses, which are no memory.
    program = compiled(tmp_path, "policy", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record_property("table", done.stdout)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_eight_threads_share_a_pool(tmp_path: Path, sanitizer: str) -> None:
    """No block has two owners, no data race. With AddressSanitizer the process also forks while they run."""
    program = compiled(tmp_path, "threads", *SANITIZERS[sanitizer])
    # ThreadSanitizer does not support a child with threads of its parent.
    done = subprocess.run([program, *(["fork"] if sanitizer == "address" else [])], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_access_to_a_freed_block_is_reported(tmp_path: Path) -> None:
    program = compiled(tmp_path, "threads", *SANITIZERS["address"])
    done = subprocess.run([program, "use-after-release"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "use-after-poison" in done.stderr
