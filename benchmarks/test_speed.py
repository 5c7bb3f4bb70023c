"""normfused beside torch.nn and the copy floor: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from cases import Case
from measure import measure
from pytest_benchmark.fixture import BenchmarkFixture
from timing import FULL, Samples

_measured = functools.lru_cache(maxsize=1)(measure)


class _Replay:
    """Plays samples to pytest-benchmark as if they passed now.

    By itself it measures one peer after the other, with the clock of the host. These samples were interleaved, and on
    CUDA come from the clock of the device.
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
    more = ("compile",) if request.config.getoption("--torch-compile") else ()
    samples: Samples = _measured(case, device, FULL, more).samples
    benchmark.group = case.name
    _replay.load(samples[peer])
    benchmark.pedantic(_replay.play, rounds=len(samples[peer]))
