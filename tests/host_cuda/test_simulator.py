"""The simulator and the sanitizers report every fault, and report nothing for correct kernels."""

from pathlib import Path

import pytest
from host_build import ADDRESS, HERE, PLAIN, THREAD, build, clang, gcc, run

FAULTS = [HERE / "faults.cpp"]


@pytest.mark.parametrize("order", [0, 1, 7])
@pytest.mark.parametrize("contexts", ["", "-DCUDAHOST_UCONTEXT"])
def test_reports_faults(cache: Path, contexts: str, order: int) -> None:
    done = run(build(cache, gcc(), f"{PLAIN} {contexts}", FAULTS), order=order)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("past_static", "use-after-poison"),
        ("past_dynamic", "use-after-poison"),
        ("past_global", "heap-buffer-overflow"),
        ("past_global_atomically", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
        ("leaves_while_read", "use-after-poison"),
    ],
)
def test_address_sanitizer_reports(cache: Path, fault: str, message: str) -> None:
    done = run(build(cache, gcc(), ADDRESS, FAULTS), fault, order=1)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(
    "fault", ["reverse_without_barrier", "overwritten_too_early", "warp_sum_unsynced", "blocks_race", "blocks_add"]
)
@pytest.mark.parametrize("order", [0, 1, 7])
def test_thread_sanitizer_reports(cache: Path, fault: str, order: int) -> None:
    done = run(build(cache, clang(), THREAD, FAULTS), fault, order=order)
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


@pytest.mark.parametrize("kernel", ["reverse", "warp_sum", "blocks_add_atomically"])
@pytest.mark.parametrize("flags", [ADDRESS, THREAD])
def test_sanitizers_accept_correct_kernels(cache: Path, kernel: str, flags: str) -> None:
    done = run(build(cache, clang() if flags == THREAD else gcc(), flags, FAULTS), kernel)
    assert done.returncode == 0, done.stderr
