"""Speed of normfused compared with torch.nn and a copy: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from cases import Case
from measure import measure
from peers import LOCAL
from pytest_benchmark.fixture import BenchmarkFixture
from timing import FULL, Samples

_measured = functools.lru_cache(maxsize=1)(measure)


class _Replay:
    """A clock and a call that replay recorded samples to pytest-benchmark.

    pytest-benchmark would time one peer after the other with the host's clock. The recorded samples are interleaved
    between peers, and on CUDA they are device times.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: Iterator[float] = iter(())

    def load(self, samples: list[float]) -> None:
        self._now, self._samples = 0.0, iter(samples)

    def now(self) -> float:
        return self._now

    def play(self) -> None:
        self._now += next(self._samples)


_replay = _Replay()


@pytest.mark.benchmark(timer=_replay.now)
def test_speed(benchmark: BenchmarkFixture, device: str, case: Case, peer: str, request: pytest.FixtureRequest) -> None:
    peers = (*LOCAL, "compile") if request.config.getoption("--torch-compile") else LOCAL
    samples: Samples = _measured(case, device, FULL, peers).samples
    benchmark.group = case.name
    _replay.load(samples[peer])
    benchmark.pedantic(_replay.play, rounds=len(samples[peer]))
