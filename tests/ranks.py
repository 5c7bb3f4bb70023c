"""Processes that run functions of the tests as the ranks of a gloo group. They end with the tests."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed

GROUP_TIMEOUT = 20  # seconds that a collective waits for the others


def _serve(rank: int, parent: Connection) -> None:
    """Run the functions that the parent process sends, until its pipe closes."""
    torch.set_num_threads(1)
    while True:
        try:
            size, store, environment, function, arguments = parent.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            torch.manual_seed(0)
            timeout = timedelta(seconds=GROUP_TIMEOUT)
            distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout
            )
            try:
                answer = function(*arguments), None
            finally:
                distributed.destroy_process_group()
        except BaseException:
            answer = None, traceback.format_exc()
        for name in environment:
            del os.environ[name]
        parent.send(answer)


class Ranks:
    """Processes that are started once, because importing torch takes seconds. Each call has its own process group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = 0
        self.workers: list[tuple[Any, Connection]] = []

    def run(
        self, size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120, **environment: str
    ) -> list[Any]:
        """Run ``function(*arguments)`` on ``size`` ranks and return the results. Raise if it fails on any rank."""
        context = multiprocessing.get_context("spawn")
        while len(self.workers) < size:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(len(self.workers), there), daemon=True)
            process.start()
            there.close()  # so that the pipe closes when the process ends
            self.workers.append((process, here))
        self.calls += 1
        store = self.folder / f"store{self.calls}"
        for _, pipe in self.workers[:size]:
            pipe.send((size, store, environment, function, arguments))
        results, failures = [], []
        for rank, (_, pipe) in enumerate(self.workers[:size]):
            try:
                if not pipe.poll(timeout):
                    raise EOFError(f"no answer within {timeout} s")
                result, failure = pipe.recv()
            except EOFError as error:
                self.stop()
                raise AssertionError(f"rank {rank} of {function.__name__}: {error or 'died'}") from error
            results.append(result)
            failures += [f"rank {rank}: {failure}"] if failure else []
        assert not failures, "\n".join(failures)
        return results

    def stop(self) -> None:
        """Kill all processes."""
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers = []
