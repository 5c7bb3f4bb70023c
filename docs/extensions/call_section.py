"""Renders the section "Call" of a layer's docstring: the form of a call, and a list of its arguments."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

ARGUMENT = re.compile(r"    ([\w*]+(?:, [\w*]+)*): (.*)")


def list_arguments(lines: list[str]) -> list[str]:
    """The lines of a docstring, with the arguments of a call as a bullet list."""
    result: list[str] = []
    in_call = in_list = False
    for line in lines:
        if line and not line.startswith(" "):
            in_call, in_list = line == "Call:", False
        argument = ARGUMENT.fullmatch(line) if in_call else None
        if argument:
            in_list = True
            line = f"    * **{argument[1]}** – {argument[2]}"
        elif in_list and line.startswith("        "):
            line = line[2:]  # aligned with the text after the bullet
        result.append(line)
    return result


def process(app: Sphinx, what: str, name: str, object: Any, options: Any, lines: list[str]) -> None:
    lines[:] = list_arguments(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon's 500
    return {"parallel_read_safe": True}
