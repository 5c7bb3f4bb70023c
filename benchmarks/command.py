"""The command line of the benchmarks that write one table: activations, images, sync and conversion."""

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
Render = Callable[[dict[str, Any], list[Row]], str]
Draw = Callable[[dict[str, Any], list[Row], Path], None]


def run(
    doc: str | None,
    name: str,
    measure: Callable[[str], list[Row]],
    render: Render,
    rehearse: Callable[[str], list[Row]] | None = None,
    draw: Draw | None = None,
) -> int:
    """Measures on the requested device, and writes ``name``.json and ``name``.md. Returns the exit status.

    `measure` and `rehearse` map a device to rows, and `render` makes Markdown of the machine and the rows.
    `rehearse` replaces `measure` with ``--tiny``: small tensors, and figures without meaning. `draw` writes a plot into
    the folder.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/<device>)")
    parser.add_argument("--render", type=Path, metavar="DIR", help=f"measure nothing: write {name}.md from {name}.json")
    if rehearse is not None:
        parser.add_argument("--tiny", action="store_true", help="rehearsal: small tensors; the figures mean nothing")
    arguments = parser.parse_args()
    if arguments.render:
        print(write(name, render, arguments.render, draw))
        return 0
    if normfused.info()["extension"] != "loaded":
        reason = normfused.info()["fallback_reason"]
        print(f"the benchmarks need the extension, which is not loaded: {reason}", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    description = machine.describe(arguments.device)
    folder: Path = arguments.out or Path(__file__).parent / "results" / machine.slug(description)
    folder.mkdir(parents=True, exist_ok=True)
    rows = rehearse(arguments.device) if rehearse and arguments.tiny else measure(arguments.device)
    (folder / f"{name}.json").write_text(json.dumps({"machine": description, name: rows}, indent=1) + "\n")
    print(f"\n{write(name, render, folder, draw)}\nwritten to {folder}")
    return 0


def write(name: str, render: Render, folder: Path, draw: Draw | None = None) -> str:
    """Writes ``name``.md and the plot from ``name``.json, and returns the text."""
    measured = json.loads((folder / f"{name}.json").read_text())
    text = render(measured["machine"], measured[name])
    (folder / f"{name}.md").write_text(text)
    if draw is not None:
        draw(measured["machine"], measured[name], folder)
    return text


def versions(description: dict[str, Any]) -> str:
    """One line: versions of normfused and torch, threads, date."""
    return (
        f"normfused {description['normfused']} ({description['revision']}), torch {description['torch']}, "
        f"{description['threads']} threads, {description['date']}"
    )
