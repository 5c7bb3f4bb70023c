"""Peers in a process of their own, for settings and libraries that hold for a whole process.

A worker builds the calls of a case from the same inputs as the report's process, checks their results, and times one
call whenever it is told to. Between requests it waits for the next one without using a core.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from cases import Call, Case, Oracle
from timing import Sampler, host_sampler
from torch import Tensor

REST_SECONDS = 0.1  # longest wait for sleeping threads
END_SECONDS = 10.0  # longest wait for the end of a process
ANSWER_SECONDS = 300.0  # longest wait for a reply; a case takes some seconds


@dataclass(frozen=True)
class Offer:
    """What a process offers for a case: calls by peer, all on the same inputs."""

    calls: Mapping[str, Call]
    inputs: Sequence[Tensor]  # what the calls read
    plain: Callable[[Sequence[Any]], Sequence[Any]] = list  # makes dense tensors in torch's layout of a call's results
    note: str = ""  # what was chosen for the case, for example a layout


@dataclass(frozen=True)
class Prepared:
    """The reply of a worker that is ready to time a case."""

    error: dict[str, float]  # by peer, relative to the largest value
    note: str


class WorkerError(Exception):
    """The worker could not do what it was told, or it died."""


class Worker:
    """A process that times peers. `build` makes the calls; it must be importable by name.

    The process starts with the first case, and again with the next case after it has died. It ends with its parent.
    """

    def __init__(
        self,
        peers: Sequence[str],
        build: Callable[[Case], Offer],
        environment: Mapping[str, str] | None = None,
        threads: int = 1,
    ) -> None:
        self.peers = tuple(peers)
        self._build, self._threads = build, threads
        self._environment = {"OMP_NUM_THREADS": str(threads), **(environment or {})}
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def prepare(self, case: Case) -> Prepared:
        """Builds, checks and warms up the calls of a case."""
        if self._process is None:
            self._start()
        prepared: Prepared = self._ask(case)
        return prepared

    def sampler(self, peer: str) -> Sampler:
        """Times one call of a peer on the prepared case."""
        return lambda: self._ask(peer)

    def close(self) -> None:
        if self._process is not None and self._connection is not None:
            self._connection.close()  # ends `_serve`
            self._process.join(timeout=END_SECONDS)
            self._process.kill()
        self._process = self._connection = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, end = context.Pipe()
        arguments = (end, self._build, self._threads)
        self._process = context.Process(target=_serve, args=arguments, name="+".join(self.peers), daemon=True)
        with _environment(self._environment):
            self._process.start()
        end.close()  # now only the worker holds it: its death closes the pipe

    def _ask(self, request: Case | str) -> Any:
        assert self._process is not None
        assert self._connection is not None
        name = self._process.name
        try:
            self._connection.send(request)
            if not self._connection.poll(ANSWER_SECONDS):
                self.close()
                raise WorkerError(f"the process of {name} did not answer for {ANSWER_SECONDS:.0f} s")
            failure, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(timeout=END_SECONDS)
            status = self._process.exitcode
            self.close()
            raise WorkerError(f"the process of {name} died with status {status}") from None
        if failure:
            raise WorkerError(f"{name}: {failure}")
        return value


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables. A spawned process inherits them before its C library starts."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass
class _Server:
    """The state of a worker process: the samplers of its current case."""

    build: Callable[[Case], Offer]
    samplers: dict[str, Sampler] = field(default_factory=dict)

    def answer(self, request: Case | str) -> Any:
        return self.samplers[request]() if isinstance(request, str) else self.prepare(request)

    def prepare(self, case: Case) -> Prepared:
        self.samplers.clear()  # they hold the tensors of the previous case
        offer = self.build(case)
        oracle = Oracle(case, "cpu")
        error = {peer: oracle.error(peer, offer.plain(call())) for peer, call in offer.calls.items()}
        self.samplers.update({peer: host_sampler(call, offer.inputs) for peer, call in offer.calls.items()})
        for sampler in [*self.samplers.values()] * 2:
            sampler()  # warm-up
        gc.collect()
        return Prepared(error, offer.note)


def _serve(connection: Connection, build: Callable[[Case], Offer], threads: int) -> None:
    """Answers requests until the parent closes its end of the pipe, or ends."""
    torch.set_num_threads(threads)
    gc.disable()  # as in timing.interleave
    server = _Server(build)
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            request = connection.recv()
            try:
                reply = ("", server.answer(request))
            except Exception as error:
                reply = (f"{type(error).__name__}: {error}".splitlines()[0], None)
            connection.send(reply)


def rest(workers: Sequence[Worker]) -> Callable[[], None]:
    """Returns a function that waits until no thread of these workers or of this process runs.

    The threads of OpenMP poll for work for some milliseconds after a call, by default, and would take a core from the
    next peer's process. The default stays, because it is what users get: without it each parallel region would first
    have to wake its threads.
    """
    processes = [os.getpid(), *(worker.pid for worker in workers if worker.pid)]

    def wait() -> None:
        end = time.perf_counter() + REST_SECONDS
        while _running(processes) and time.perf_counter() < end:
            time.sleep(5e-4)

    return wait


def _running(processes: Sequence[int]) -> bool:
    """Whether a thread of these processes runs, other than the calling one. False without /proc."""
    caller = str(threading.get_native_id())
    for task in (task for process in processes for task in Path(f"/proc/{process}/task").glob("*")):
        with contextlib.suppress(OSError):  # the thread has ended
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            if state == "R" and task.name != caller:
                return True
    return False
