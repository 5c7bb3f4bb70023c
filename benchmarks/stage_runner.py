"""Runs commands as process groups with a time limit, and saves their output and verdicts in one archive."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# The minimum a stage needs to start, and the time reserved for writing the archive.
LEAST_SECONDS = 15.0
RESERVED_SECONDS = 5.0


class NotProven(Exception):  # noqa: N818
    """The output of a command does not prove what its stage must prove. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Command:
    argv: list[str]
    # Converts the output to one line for the verdict, or raises NotProven. Not called if the command failed.
    judge: Callable[[str], str] = lambda output: last_line(output)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    accepted: tuple[int, ...] = (0,)  # exit statuses

    def __str__(self) -> str:
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*settings, *self.argv])


@dataclasses.dataclass
class Verdict:
    stage: str
    status: str  # "passed", "failed", "killed", "skipped" or "not run"
    seconds: float
    cap: float
    summary: str

    def __str__(self) -> str:
        word = self.status if self.status == "passed" else self.status.upper()
        return f"{self.stage:11} {word:8} {self.seconds:6.1f} of {self.cap:3.0f} s  {self.summary}"


class Run:
    """One run of some stages: a folder with logs, result files and verdicts.json, and an archive of that folder."""

    def __init__(self, folder: Path, archive: Path, seconds: float, header: Mapping[str, Any]) -> None:
        self.folder, self.archive = folder, archive
        self.header = header
        self.verdicts: list[Verdict] = []
        self._deadline = time.monotonic() + seconds - RESERVED_SECONDS
        (folder / "logs").mkdir(parents=True)

    def left(self) -> float:
        """Seconds left for stages."""
        return self._deadline - time.monotonic()

    def stage(self, name: str, cap: float, commands: Callable[[float], Sequence[Command] | str]) -> Verdict:
        """Runs a stage's commands in order, until one fails.

        `commands` receives the seconds available to the stage. It may return a reason to skip the stage instead.
        """
        cap = min(cap, self.left())
        start = time.monotonic()
        if cap < LEAST_SECONDS:
            return self._add(Verdict(name, "not run", 0, max(cap, 0), "no time was left"))
        try:
            planned = commands(cap)
            if isinstance(planned, str):
                return self._add(Verdict(name, "skipped", 0, cap, planned))
            summaries = []
            with (self.folder / "logs" / f"{name}.log").open("w+", encoding="utf-8", errors="replace") as log:
                for command in planned:
                    summaries.append(self._execute(command, log, start + cap))
            status, summary = "passed", "; ".join(summaries)
        except subprocess.TimeoutExpired as expired:
            status, summary = "killed", f"at its cap: {last_line(str(expired.output))}"
        except NotProven as why:
            status, summary = "failed", str(why)
        return self._add(Verdict(name, status, round(time.monotonic() - start, 1), round(cap), summary))

    def _execute(self, command: Command, log: Any, end: float) -> str:
        print(f"$ {command}", file=log, flush=True)
        begin = log.tell()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **command.environment}
        code: int | None = None
        with (
            group(command.argv, stdout=log, env=environment, cwd=self.folder) as process,
            contextlib.suppress(subprocess.TimeoutExpired),
        ):
            code = process.wait(max(0.0, end - time.monotonic()))
        log.seek(begin)
        output = log.read()
        if code is None:
            raise subprocess.TimeoutExpired(command.argv, end, output)
        if code not in command.accepted:
            print("\n".join(output.splitlines()[-20:]), flush=True)
            raise NotProven(f"exit status {code}: {last_line(output)}")
        return command.judge(output)

    def _add(self, verdict: Verdict) -> Verdict:
        """Prints the verdict and updates the archive, so that a run that is cut off keeps its completed stages."""
        self.verdicts.append(verdict)
        print(verdict, flush=True)
        written = {**self.header, "verdicts": [dataclasses.asdict(v) for v in self.verdicts]}
        (self.folder / "verdicts.json").write_text(json.dumps(written, indent=1) + "\n")
        unfinished = self.archive.with_suffix(".part")
        with tarfile.open(unfinished, "w:gz") as tar:
            tar.add(self.folder, arcname=".")
        unfinished.replace(self.archive)
        return verdict


@contextlib.contextmanager
def group(argv: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a process as the leader of a process group, and kills the whole group at the end of the block.

    It is a group and not a session, so that ending the caller's session ends it too.
    """
    options |= {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "preexec_fn": os.setpgrp}
    process = subprocess.Popen(list(argv), **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(output: str) -> str:
    """The last line that is not blank."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
