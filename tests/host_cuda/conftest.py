"""Fixtures for the kernels in the simulator."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that keeps built programs between test runs, if pytest has a cache."""
    kept = getattr(request.config, "cache", None)  # absent with -p no:cacheprovider
    return kept.mkdir("host_cuda") if kept else tmp_path_factory.mktemp("host_cuda")
