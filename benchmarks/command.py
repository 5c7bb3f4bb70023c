"""What the small benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch

import normfused

Row = dict[str, Any]


def run(
    doc: str | None,
    name: str,
    measure: Callable[[str], list[Row]],
    render: Callable[[dict[str, Any], list[Row]], str],
    rehearse: Callable[[str], list[Row]] | None = None,
) -> int:
    """Measures on the requested device, and writes ``name``.json and, from the machine and the rows, ``name``.md.

    `rehearse` is what ``--tiny`` runs instead of `measure`: rows without meaning, of small tensors.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="2")
    parser.add_argument("--out", type=Path, help="folder; benchmarks/results/<device>")
    if rehearse is not None:
        parser.add_argument("--tiny", action="store_true", help="small tensors, two rounds: no figures, a rehearsal")
    arguments = parser.parse_args()
    tiny = rehearse is not None and arguments.tiny
    if normfused.info()["extension"] != "loaded":
        print(
            f"nothing to measure, the extension is not loaded: {normfused.info()['fallback_reason']}", file=sys.stderr
        )
        return 1
    torch.set_num_threads(arguments.threads)
    description = machine.describe(arguments.device)
    folder: Path = arguments.out or Path(__file__).parent / "results" / machine.slug(description)
    folder.mkdir(parents=True, exist_ok=True)
    rows = rehearse(arguments.device) if tiny and rehearse else measure(arguments.device)
    (folder / f"{name}.json").write_text(json.dumps({"machine": description, name: rows}, indent=1) + "\n")
    print(f"\n{write(name, render, folder)}\nwritten to {folder}")
    return 0


def write(name: str, render: Callable[[dict[str, Any], list[Row]], str], folder: Path) -> str:
    """``name``.md from ``name``.json."""
    measured = json.loads((folder / f"{name}.json").read_text())
    text = render(measured["machine"], measured[name])
    (folder / f"{name}.md").write_text(text)
    return text


def versions(description: dict[str, Any]) -> str:
    return (
        f"normfused {description['normfused']} ({description['revision']}), torch {description['torch']}, "
        f"{description['threads']} threads, {description['date']}"
    )
