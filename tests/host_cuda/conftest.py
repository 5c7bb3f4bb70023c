"""Fixtures of the kernels that run on the CPU."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    """Where built programs stay from one run of the tests to the next."""
    assert request.config.cache is not None
    return request.config.cache.mkdir("host_cuda")
