"""Reads the machine code of kernels: memory accesses, loads in flight, loops, and calls of division subroutines."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) ?;", re.MULTILINE)
LOAD = re.compile(r"LDG\.E(?P<how>[.\w]*)\.128(?:\.\w+)* R(?P<first>\d+)")
REGISTER = re.compile(r"\bR(\d+)(\.64)?")
CALL = re.compile(r"CALL\.REL\.NOINC (?:`\(\S+\)|0x(?P<target>[0-9a-f]+))")


class Function(NamedTuple):
    name: str
    addresses: list[int]
    instructions: list[str]


def functions(cuobjdump: str, path: Path) -> Iterator[Function]:
    """The functions of an object file."""
    sass = subprocess.run([cuobjdump, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    for function in sass.split("Function : ")[1:]:
        found = INSTRUCTION.findall(function)
        yield Function(function.split(None, 1)[0], [int(at, 16) for at, _ in found], [text for _, text in found])


def loads_in_flight(instructions: Sequence[str], how: str | None = None) -> int:
    """The maximum number of 128-bit loads that are issued before the first of them is used.

    Counted in the order of the code, so it is that of the best loop or branch. `how` selects loads by their cache hint.
    """
    flying: list[set[int]] = []
    most = 0
    for text in instructions:
        load = LOAD.search(text)
        if load is None or (how is not None and load["how"] != how):
            used = _sources(text)
            flying = [registers for registers in flying if not registers & used]
            continue
        target = set(range(int(load["first"]), int(load["first"]) + 4))
        touched = target | _registers(text[load.end() :])
        flying = [*(registers for registers in flying if not registers & touched), target]
        most = max(most, len(flying))
    return most


def stores(instructions: Sequence[str], pattern: str) -> int:
    """The number of instructions that match a pattern."""
    return sum(re.search(pattern, text) is not None for text in instructions)


def innermost_loops(function: Function) -> list[list[str]]:
    """The instructions of each loop that contains no other loop."""
    code = list(zip(function.addresses, function.instructions, strict=True))
    jumps = [(int(to[1], 16), at) for at, text in code if (to := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]
    loops = [(first, last) for first, last in jumps if first < last]
    return [
        [text for at, text in code if first <= at <= last]
        for first, last in loops
        if not any((first, last) != (a, b) and first <= a and b <= last for a, b in loops)
    ]


def divides_before_it_loads(function: Function) -> bool:
    """Whether a 64-bit integer division, which is a call, comes before the first wide load or asynchronous copy."""
    for text in function.instructions:
        if LOAD.search(text) or "LDGSTS" in text:
            return False
        call = CALL.search(text)
        if call is not None and call["target"] is not None and _divides(function, int(call["target"], 16)):
            return True
    return False


def _divides(function: Function, target: int) -> bool:
    """Whether a subroutine divides integers: it begins with the reciprocal of a 64-bit integer."""
    for at, text in zip(function.addresses, function.instructions, strict=True):
        if at >= target and text.startswith("I2F.U64"):
            return True
        if at >= target and "RET." in text:
            return False
    return False


def _sources(text: str) -> set[int]:
    """The registers that an instruction reads."""
    operation, _, operands = re.sub(r"^@!?U?P\w+ ", "", text).partition(" ")
    return _registers(operands if operation.startswith(("ST", "RED")) else operands.partition(",")[2])


def _registers(operands: str) -> set[int]:
    found = REGISTER.findall(operands)
    return {int(number) for number, _ in found} | {int(number) + 1 for number, wide in found if wide}
