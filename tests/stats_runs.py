"""Images, and a caller of ``normfused stats``, for the tests of the command."""

from __future__ import annotations

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
