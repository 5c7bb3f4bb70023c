"""Fixtures for the kernels in the simulator."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    """The folder that keeps built programs between test runs."""
    assert request.config.cache is not None
    return request.config.cache.mkdir("host_cuda")
