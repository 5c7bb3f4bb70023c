"""The peers that live in processes of their own, and how these processes are started."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onednn.calls
import onednn.library
import torch
from cases import Case, build_calls, inputs_read, mkldnn_call
from worker import Offer, Worker

# glibc then serves every size from its heap, and never returns the heap's pages: a new tensor needs no new pages. These
# settings are read when a process starts. Setting them later would turn off the adaptation that users get.
KEEP_PAGES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def kept(case: Case) -> Offer:
    """The call of the peer `torch`."""
    return Offer({"kept": build_calls(case, "cpu", ["torch"])["torch"]}, inputs_read(case))


def mkldnn(case: Case) -> Offer:
    """torch.nn on a tensor in torch's oneDNN layout. Converting the input and the output is not part of the call."""
    call, memory = mkldnn_call(case)
    return Offer({"mkldnn": call}, [memory], plain=lambda results: [result.to_dense() for result in results])


@dataclass(frozen=True)
class Process:
    peers: tuple[str, ...]
    build: Callable[[Case], Offer]
    missing: Callable[[], str | None]  # why this machine cannot run it
    environment: Mapping[str, str] = field(default_factory=dict)


def _no_glibc() -> str | None:
    return None if platform.libc_ver()[0] == "glibc" else "malloc is not glibc's"


def _no_mkldnn() -> str | None:
    return None if torch.backends.mkldnn.is_available() else "torch was built without oneDNN"


def _no_onednn() -> str | None:
    try:
        onednn.library.compiled()
    except onednn.library.UnavailableError as error:
        return str(error)
    return None


PROCESSES = (
    Process(("kept",), kept, _no_glibc, KEEP_PAGES),
    Process(("mkldnn",), mkldnn, _no_mkldnn),
    Process(("onednn", "onednn_reused"), onednn.calls.build, _no_onednn),
)


def workers(peers: Sequence[str], threads: int) -> tuple[list[Worker], dict[str, str]]:
    """Workers for those of the peers that need one, and why others are missing, by peer."""
    made, missing = [], {}
    for process in PROCESSES:
        chosen = [peer for peer in process.peers if peer in peers]
        if chosen and (reason := process.missing()):
            missing.update(dict.fromkeys(chosen, reason))
        elif chosen:
            made.append(Worker(chosen, process.build, process.environment, threads))
    return made, missing
