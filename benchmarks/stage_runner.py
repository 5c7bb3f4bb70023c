"""Runs commands with a cap on their time, as process groups, and keeps what they said in one archive."""

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

# What a stage needs at least, and what stays for the archive.
LEAST_SECONDS = 15.0
RESERVED_SECONDS = 5.0


class NotProven(Exception):  # noqa: N818
    """What a command did does not show what its stage is to show; says why in one line."""


@dataclasses.dataclass(frozen=True)
class Command:
    argv: list[str]
    # From its output to one line for the verdict; raises NotProven. Not called where the command failed.
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
    """One run of some stages: a folder with their logs and files, verdicts.json, and the archive of it all."""

    def __init__(self, folder: Path, archive: Path, seconds: float, header: Mapping[str, Any]) -> None:
        self.folder, self.archive = folder, archive
        self.header = header
        self.verdicts: list[Verdict] = []
        self._deadline = time.monotonic() + seconds - RESERVED_SECONDS
        (folder / "logs").mkdir(parents=True)

    def left(self) -> float:
        return self._deadline - time.monotonic()

    def stage(self, name: str, cap: float, commands: Callable[[float], Sequence[Command] | str]) -> Verdict:
        """Runs a stage's commands, until one fails.

        `commands` gets the seconds that there are, and may give instead a reason to skip the stage.
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
        """Tells and archives at once, so that a run that is cut off keeps the stages before."""
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
    """A process that leads a process group, of which nothing is left at the end, in whatever way that comes.

    A group, not a session: whoever ends the session of the caller ends this too.
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
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
