"""Options of ``pytest benchmarks``. There is one test per case and peer."""

from __future__ import annotations

import pytest
import torch
from cases import Case, grid
from peers import LOCAL, peer_names

import normfused


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("normfused benchmarks")
    group.addoption("--all-cases", action="store_true", help="the whole grid instead of three shapes in two variants")
    group.addoption("--torch-compile", action="store_true", help="measure torch.compile too")
    group.addoption("--threads", type=int, default=2, help="CPU threads (default: 2)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "peer"} <= set(metafunc.fixturenames):
        option = metafunc.config.getoption
        peers = (*LOCAL, "compile") if option("--torch-compile") else LOCAL
        pairs = [(case, peer) for case in _cases(option("--all-cases")) for peer in peer_names(case, peers)]
        metafunc.parametrize(("case", "peer"), pairs, ids=[f"{case.name}-{peer}" for case, peer in pairs])


def _cases(all_cases: bool) -> list[Case]:
    if all_cases:
        return grid(measured_device())
    variants = {(torch.float32, "NCHW"), (torch.bfloat16, "channels_last")}
    return [case for case in grid(measured_device(), quick=True) if (case.dtype, case.layout) in variants]


def measured_device() -> str:
    return "cuda" if torch.cuda.is_available() and normfused.info()["cuda"] else "cpu"


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    info = normfused.info()
    if info["extension"] != "loaded":
        pytest.skip(f"the benchmarks need the extension, which is not loaded: {info['fallback_reason']}")
    torch.set_num_threads(request.config.getoption("--threads"))
    return measured_device()
