"""Fixtures for the kernels in the simulator."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that keeps built programs between test runs, if pytest has a cache."""
    kept = getattr(request.config, "cache", None)  # absent with -p no:cacheprovider
    return kept.mkdir("host_cuda") if kept else tmp_path_factory.mktemp("host_cuda")


@pytest.fixture
def folder(request: pytest.FixtureRequest, cache: Path) -> Iterator[Path]:
    """An empty folder. Its path is the same in every run: for ccache, a path in a command is part of the command."""
    folder = cache / re.sub(r"\W+", "-", request.node.name)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)
