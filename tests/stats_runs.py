"""Images, and callers of ``normfused stats``, for the tests of the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from normfused import ChannelStats
from normfused.cli.main import main

RANDOM = np.random.default_rng(0)
PICTURES = [RANDOM.integers(0, 250 - 20 * i, (6 + i, 9, 3), dtype=np.uint8) for i in range(5)]
STACK = RANDOM.integers(0, 256, (20, 6, 5), dtype=np.uint8)
GRAY, RGB = Image.fromarray(STACK[0]), Image.fromarray(PICTURES[0])


def expected(images: list[np.ndarray], layout: str | None = None, scale: float | None = None) -> ChannelStats:
    stats = ChannelStats(scale)
    for image in images:
        stats.update(image, layout)
    return stats


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main(["stats", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def fails_with(message: str, capsys: pytest.CaptureFixture[str], *arguments: Any) -> bool:
    return run(capsys, *arguments) == (2, "", f"normfused stats: error: {message}\n")


# The command on 200 files, each of which takes 50 ms and gives one image. The file N.pid says that process N reads.
_SLOW = """
import os, sys, time
import numpy as np
from normfused.cli.main import main
from normfused.data import paths, pictures
from normfused.data.sources import Files
from pathlib import Path

folder, thread_bytes, *arguments = sys.argv[1:]

def read(self, index):
    if index >= 8:
        Path(folder, f"{os.getpid()}.pid").touch()
    time.sleep(0.05)
    yield np.full((4, 4), index, dtype=np.uint8), "HW"

pictures.Pictures.read = read
pictures.THREAD_BYTES = int(thread_bytes)
paths.find_files = lambda *_: Files([Path(folder, f"{i:03}.slow") for i in range(200)])
sys.exit(main(["stats", folder, *arguments]))
"""


def signalled(
    folder: Path, sent: signal.Signals, *arguments: Any, thread_bytes: int = 0, to_group: bool = True
) -> tuple[int, str, str]:
    """Exit code and output of the command on slow files after a signal while it reads.

    The signal goes to the process or, as Ctrl-C in a terminal does, to its workers too.
    """
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SLOW, str(folder), str(thread_bytes), *map(str, arguments)],
        cwd=folder,  # not the checkout: its normfused/ may have no extension
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Processes in the background of a shell inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        patience = time.monotonic() + 120
        while not list(folder.glob("*.pid")) and time.monotonic() < patience and process.poll() is None:
            time.sleep(0.02)
        (os.killpg if to_group else os.kill)(process.pid, sent)
        table, error = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, table, error


def readers(folder: Path) -> list[str]:
    """The processes of :func:`signalled` that have not ended."""

    def is_running(number: str) -> bool:
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return False
        return True

    return [path.stem for path in folder.glob("*.pid") if is_running(path.stem)]
