"""Fuzzing of the readers of files. NORMFUSED_FUZZ_SECONDS: of each kind of file."""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import readers

from normfused.data import arrays, files, records

SECONDS = os.environ.get("NORMFUSED_FUZZ_SECONDS")
DEFAULT_FILES = 1000  # of each kind


def run_reader(kind: str, folder: Path, count: int, seconds: float | None = None) -> int:
    """Reads the valid files, then files with changes: `count` of them, or for some seconds. Returns how many."""
    source, end = random.Random(1), time.monotonic() + (seconds or 0)
    path, done = folder / f"file.{kind}", 0
    contents = list(readers.SEEDS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy and Pillow about damaged files
        while contents or done < count or time.monotonic() < end:
            content = contents.pop() if contents else readers.mutate(source, readers.SEEDS[kind])
            try:
                readers.check(kind, path, content)
            except Exception as error:
                raise AssertionError(f"{kind} file {content!r}: {error!r}") from error
            done += 1
    return done


@pytest.mark.parametrize("kind", readers.SEEDS)
def test_readers(kind: str, tmp_path: Path, record_property: Callable[[str, str], None]) -> None:
    done = run_reader(kind, tmp_path, DEFAULT_FILES, float(SECONDS) if SECONDS else None)
    record_property("table", f"{kind}: {done} files")


@pytest.mark.parametrize(
    ("kind", "module", "name", "fault"),
    [
        ("npz", arrays, "_names_a_file", lambda error: isinstance(error, OSError)),
        ("idx", files, "_IDX_DTYPES", {**files._IDX_DTYPES, 0x0C: "<i4"}),
        ("json", records, "_check_record", lambda record: None),
    ],
)
def test_a_planted_fault_of_a_reader_is_found(
    kind: str, module: object, name: str, fault: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError, match=f"{kind} file"):
        run_reader(kind, tmp_path, 3 * DEFAULT_FILES)
