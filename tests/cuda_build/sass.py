"""Reads the machine code of kernels: their accesses to memory, and how many loads are on their way at once."""

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
    """Each function of an object."""
    sass = subprocess.run([cuobjdump, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    for function in sass.split("Function : ")[1:]:
        found = INSTRUCTION.findall(function)
        yield Function(function.split(None, 1)[0], [int(at, 16) for at, _ in found], [text for _, text in found])


def loads_in_flight(instructions: Sequence[str], how: str | None = None) -> int:
    """How many 128-bit loads are outstanding together at most, before the first of them is used.

    In the order of the code, so of the loop or branch that does best. `how` selects loads by their cache hint.
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
    return sum(re.search(pattern, text) is not None for text in instructions)


def innermost_loops(function: Function) -> list[list[str]]:
    """The instructions of each loop in which there is no other."""
    code = list(zip(function.addresses, function.instructions, strict=True))
    jumps = [(int(to[1], 16), at) for at, text in code if (to := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]
    loops = [(first, last) for first, last in jumps if first < last]
    return [
        [text for at, text in code if first <= at <= last]
        for first, last in loops
        if not any((first, last) != (a, b) and first <= a and b <= last for a, b in loops)
    ]


def divides_before_it_loads(function: Function) -> bool:
    """Whether a division of 64-bit integers, which is a call, comes before the first wide load."""
    for text in function.instructions:
        if LOAD.search(text):
            return False
        call = CALL.search(text)
        if call is not None and call["target"] is not None and _divides(function, int(call["target"], 16)):
            return True
    return False


def _divides(function: Function, target: int) -> bool:
    """Whether a subroutine is that of integers: it begins with a reciprocal of a 64-bit integer."""
    for at, text in zip(function.addresses, function.instructions, strict=True):
        if at >= target and text.startswith("I2F.U64"):
            return True
        if at >= target and "RET." in text:
            return False
    return False


def _sources(text: str) -> set[int]:
    """Registers that an instruction reads."""
    operation, _, operands = re.sub(r"^@!?U?P\w+ ", "", text).partition(" ")
    return _registers(operands if operation.startswith(("ST", "RED")) else operands.partition(",")[2])


def _registers(operands: str) -> set[int]:
    found = REGISTER.findall(operands)
    return {int(number) for number, _ in found} | {int(number) + 1 for number, wide in found if wide}
