"""The directives ``benchmark-cells`` and ``benchmark-runs``: a table of all cells of the benchmarks, and of their runs.

The tables are built from the committed JSON files when the site is built, losses first. docs/static/benchmark_cells.js
sorts and filters the rows, with the figures in a JSON block of the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from benchmark_data import Cell, Quartiles, Run, not_run_on_cuda, read
from docutils import nodes
from peers import PEERS
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from tables import table

PAGE = "benchmark_cells"
NOT_RUN = "NVIDIA GPU (not run)"
SLOWER = "▼"


def peers_of(runs: Sequence[Run]) -> list[str]:
    """The peers of any cell, in the order of ``PEERS``."""
    return [peer for peer in PEERS if any(peer in cell.ratios for run in runs for cell in run.cells)]


def ordered(runs: Sequence[Run]) -> list[tuple[Run, Cell]]:
    """All cells, beginning with the smallest ratio to a peer."""
    return sorted(((run, cell) for run in runs for cell in run.cells), key=lambda item: item[1].smallest_ratio())


def shape_text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def ratio_text(ratio: Quartiles | None) -> str:
    """The median, marked if the peer is faster."""
    if ratio is None:
        return "–"
    return f"{SLOWER} {ratio['median']:.2f}" if ratio["median"] < 1 else f"{ratio['median']:.2f}"


def html_row(device: str, cell: Cell, peers: Sequence[str]) -> str:
    texts = [cell.operation, shape_text(cell.shape), cell.dtype, cell.layout]
    milliseconds = f"{cell.seconds['median'] * 1e3:.3g}" if cell.seconds else "–"
    copies = f"{next(iter(cell.copies.values()))['median']:.2f}" if cell.copies else "–"
    figures = [milliseconds, *(ratio_text(cell.ratios.get(peer)) for peer in peers), copies]
    tags = [f"<td>{escape(text)}</td>" for text in texts]
    tags += [f'<td class="slower">{text}</td>' if SLOWER in text else f"<td>{text}</td>" for text in figures]
    return f"<tr>{''.join(tags)}<td>{escape(device)}</td></tr>"


def html_table(cells: Iterable[tuple[Run, Cell]], not_run: Iterable[Cell], peers: Sequence[str]) -> str:
    """The table: measured cells, and in a hidden second body those that are not run."""
    columns = {name: name for name in ("operation", "shape", "dtype", "layout")}
    columns |= {"time": "normfused, ms", **{peer: PEERS[peer].title for peer in peers}}
    columns |= {"copy": "time / copy", "machine": "machine"}
    head = "".join(f'<th scope="col" data-key="{key}">{title}</th>' for key, title in columns.items())
    body = "\n".join(html_row(run.device, cell, peers) for run, cell in cells)
    hidden = "\n".join(html_row(NOT_RUN, cell, peers) for cell in not_run)
    return (
        f'<div class="cells-scroll" role="region" aria-label="All benchmark cells" tabindex="0"><table id="cells">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n<tbody hidden>\n{hidden}\n</tbody></table>"
        '<p id="cells-details" role="status" hidden></p></div>'
    )


def html_filter(cells: Sequence[tuple[Run, Cell]], not_run: Sequence[Cell], peers: Sequence[str]) -> str:
    """The controls, shown by the script."""
    machines = [run.device for run, _ in cells] + [NOT_RUN] * bool(not_run)
    every = [cell for _, cell in cells] + list(not_run)
    choices = {
        "operation": [(cell.operation, cell.operation) for cell in every],
        "dtype": [(cell.dtype, cell.dtype) for cell in every],
        "layout": [(cell.layout, cell.layout) for cell in every],
        "machine": [(name, name) for name in machines],
        "peer": [(peer, PEERS[peer].title) for peer in peers],
    }
    controls = []
    for name, options in choices.items():
        unique = options if name == "peer" else sorted(set(options))
        listed = "".join(f'<option value="{escape(value)}">{escape(title)}</option>' for value, title in unique)
        controls.append(
            f'<label>{name}<select name="{name}"><option value="">every {name}</option>{listed}</select></label>'
        )
    controls.insert(
        1, '<label>shape<input name="shape" type="search" placeholder="for example 64×56" size="14"></label>'
    )
    return f'<form id="cells-filter" hidden>{"".join(controls)}<button type="reset">Reset</button></form>'


def page_data(cells: Iterable[tuple[Run, Cell]], not_run: Iterable[Cell], peers: Sequence[str]) -> dict[str, Any]:
    """The figures of the rows of the table, in their order. Quartiles are [median, first, third], or [median]."""

    def listed(quartiles: Quartiles | None) -> list[float] | None:
        if not quartiles:
            return None
        return [quartiles[name] for name in ("median", "q1", "q3") if name in quartiles]

    def row(run: Run | None, cell: Cell) -> dict[str, Any]:
        return {
            "date": run and run.date,
            "size": math.prod(cell.shape),
            "seconds": listed(cell.seconds),
            "ratios": {peer: listed(ratio) for peer, ratio in cell.ratios.items()},
            "copies": {name: listed(distance) for name, distance in cell.copies.items()},
        }

    rows = [row(run, cell) for run, cell in cells] + [row(None, cell) for cell in not_run]
    return {"peers": {peer: PEERS[peer].title for peer in peers}, "cells": rows}


def gpu_line(runs: Sequence[Run], not_run: Sequence[Cell]) -> str:
    """What is known of GPUs."""
    ran = sorted({run.device for run in runs if run.machine["device"] == "cuda"})
    if not ran:
        return f"<strong>NVIDIA GPU: not yet run</strong> ({len(not_run)} planned cells)."
    rest = f"; {len(not_run)} planned cells not run" if not_run else ""
    return f"<strong>NVIDIA GPU</strong>: {escape(', '.join(ran))}{rest}."


def html(runs: Sequence[Run]) -> str:
    cells, not_run, peers = ordered(runs), not_run_on_cuda(runs), peers_of(runs)
    data = json.dumps(page_data(cells, not_run, peers), separators=(",", ":")).replace("<", "\\u003c")
    return "\n".join(
        (
            f'<p id="cells-gpu">{gpu_line(runs, not_run)}</p>',
            html_filter(cells, not_run, peers),
            '<p id="cells-summary" role="status"></p>',
            html_table(cells, not_run, peers),
            f'<script type="application/json" id="cells-data">{data}</script>',
        )
    )


def markdown_of_runs(runs: Sequence[Run]) -> str:
    """A table with the machine, versions and date of each run, and a link to the committed table."""
    rows = []
    for run in runs:
        machine, page = run.machine, "table" if run.file.stem == "results" else run.file.stem
        caches = ", ".join(
            f"{name.split()[0]} {size}" for name, size in machine["caches"].items() if not name.startswith("L1")
        )
        onednn = f", oneDNN {run.settings['onednn']}" if run.settings.get("onednn") else ""
        link = f"[{run.file.stem}](results/{run.folder.as_posix()}/{page}.md)"
        versions = f"normfused {machine['normfused']} ({machine['revision']}), torch {machine['torch']}{onednn}"
        where = f"{machine['cpu_capability']}, {machine['threads']} threads of {machine['cores']} cores, {caches}"
        count = f"{len(run.cells)}; **{run.failed} wrong or not measured**" if run.failed else str(len(run.cells))
        rows.append((run.device, count, link, run.date, versions, where))
    return table(("machine", "cells", "table", "date", "versions", "threads, caches"), rows, text_columns=6)


class Cells(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        runs = _read(self)
        return [nodes.raw("", html(runs), format="html")]


class Runs(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(markdown_of_runs(_read(self)))


def _read(directive: SphinxDirective) -> list[Run]:
    runs = read()
    for run in runs:
        directive.env.note_dependency(str(run.file))
    return runs


def _add_files(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    if pagename == PAGE:
        app.add_js_file("benchmark_cells.js", loading_method="defer")
        app.add_css_file("benchmark_cells.css")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("benchmark-cells", Cells)
    app.add_directive("benchmark-runs", Runs)
    app.connect("html-page-context", _add_files)
    return {"parallel_read_safe": True}
