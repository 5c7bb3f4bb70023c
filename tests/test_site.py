"""The documentation site: a build without warnings, links that lead somewhere, and the page of all benchmark cells."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from site_pages import Page, dead_links, inventory

import normfused

pytestmark = pytest.mark.exhaustive
ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs/extensions"))
if not (ROOT / "benchmarks/results").is_dir():
    pytest.skip("benchmarks/results is missing: source distributions do not contain it", allow_module_level=True)
for requirement in ("sphinx", "myst_nb", "furo", "sphinx_copybutton", "latex2mathml"):
    pytest.importorskip(requirement)

import benchmark_cells  # noqa: E402
import benchmark_data  # noqa: E402
from benchmark_data import Cell, Run  # noqa: E402

RUNS = benchmark_data.read()
CELLS = benchmark_cells.ordered(RUNS)
PEERS = benchmark_cells.peers_of(RUNS)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", ROOT / "docs", folder / "html"]
    # Not in the checkout: the current folder is first on the path, and its normfused may have no extension.
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_every_public_name_is_in_the_inventory(site: Path) -> None:
    names = inventory(site)
    for module in (normfused, normfused.functional, normfused.transforms):
        for name in module.__all__:
            same = getattr(normfused, name, None) is getattr(module, name)  # documented under the shorter name
            assert f"normfused.{name}" in names if same else f"{module.__name__}.{name}" in names, name


def test_every_link_leads_to_a_page_and_an_anchor(site: Path) -> None:
    assert dead_links(site) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    links = (
        "b.html#there",
        "b.html",
        "#here",
        "https://example.org/x",
        "mailto:a",
        "sub/",
        "b.html#gone",
        "no.html",
        "#no",
    )
    tags = "".join(f'<a href="{link}"></a>' for link in links)
    (tmp_path / "a.html").write_text(f'<p id="here">{tags}<img src="no.png"></p>')
    (tmp_path / "b.html").write_text('<h1 id="there"></h1>')
    assert dead_links(tmp_path) == [f"a.html: {link}" for link in ("#no", "b.html#gone", "no.html", "no.png", "sub/")]


def test_the_page_has_every_measured_cell(site: Path) -> None:
    count = 0
    for file in (ROOT / "benchmarks/results").glob("*/**/*.json"):
        content = json.loads(file.read_text())
        count += len(content.get(file.stem, ())) if file.stem in benchmark_data.READERS else 0
    page = Page((site / "benchmark_cells.html").read_text())
    assert len(page.rows) == count == len(CELLS) > 900
    assert page.rows == [expected_row(run, cell) for run, cell in CELLS]
    not_run = len(benchmark_data.not_run_on_cuda(RUNS))
    assert page.paragraphs["cells-gpu"] == f"NVIDIA GPU: not yet run ({not_run} planned cells)."


def expected_row(run: Run, cell: Cell) -> list[str]:
    figures = [cell.ratios[peer]["median"] if peer in cell.ratios else None for peer in PEERS]
    return [
        *(cell.operation, "×".join(map(str, cell.shape)), cell.dtype, cell.layout),
        f"{1e3 * cell.seconds['median']:.3g}" if cell.seconds else "–",
        *("–" if x is None else f"▼ {x:.2f}" if x < 1 else f"{x:.2f}" for x in figures),
        next((f"{x['median']:.2f}" for x in cell.copies.values()), "–"),
        run.device,
    ]


@pytest.fixture
def browse(site: Path, tmp_path: Path) -> Callable[..., Page]:
    """A function that opens the page of cells at a fragment, runs a script, and returns what the page is then."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")

    def run(fragment: str = "", script: str = "") -> Page:
        page = site / "benchmark_cells.html"
        if script:
            text, page = page.read_text(), site / "scripted.html"
            page.write_text(
                text.replace("</body>", f"<script>addEventListener('load', () => {{{script}}})</script></body>")
            )
        options = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}",
            "--virtual-time-budget=3000",
        )
        command = [CHROMIUM, *options, "--dump-dom", f"{page.as_uri()}#{fragment}"]
        found = Page(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)
        (site / "scripted.html").unlink(missing_ok=True)
        return found

    return run


def test_the_page_begins_with_losses(browse: Callable[..., Page]) -> None:
    page = browse()
    assert page.rows == [expected_row(run, cell) for run, cell in CELLS]
    slower = sum(cell.smallest_ratio() < 1 for _, cell in CELLS)
    assert page.paragraphs["cells-summary"].startswith(
        f"{len(CELLS)} cells, {slower} of them slower than at least one peer"
    )
    assert set(page.sorted.values()) == {"none"}


def test_filters_and_order_of_the_address(browse: Callable[..., Page]) -> None:
    page = browse("dtype=float32&layout=channels+last&peer=kept&sort=-time")
    chosen = [
        (run, cell)
        for run, cell in CELLS
        if (cell.dtype, cell.layout) == ("float32", "channels last") and "kept" in cell.ratios
    ]
    chosen.sort(key=lambda item: item[1].seconds["median"], reverse=True)
    assert page.rows == [expected_row(run, cell) for run, cell in chosen]
    assert {key: value for key, value in page.sorted.items() if value != "none"} == {"time": "descending"}
    ratios = [cell.ratios["kept"]["median"] for _, cell in chosen]
    slower, mean = sum(ratio < 1 for ratio in ratios), statistics.geometric_mean(ratios)
    title = benchmark_cells.PEERS["kept"].title
    assert page.paragraphs["cells-summary"] == (
        f"{len(chosen)} cells, {slower} of them slower than {title} (▼). "
        f"Time of {title} / time of normfused: geometric mean {mean:.2f}."
    )


def test_shapes_and_machines_of_the_address(browse: Callable[..., Page]) -> None:
    machine, operation = RUNS[-1].device, "BN training, forward"
    page = browse(f"shape=64x56&machine={quote(machine)}&operation={quote(operation)}")
    assert page.rows
    assert sorted(page.rows) == sorted(
        expected_row(run, cell)
        for run, cell in CELLS
        if run.device == machine and cell.operation == operation and cell.shape[1:3] == (64, 56)
    )
    page = browse(f"machine={quote(benchmark_cells.NOT_RUN)}&sort=shape")
    planned = benchmark_data.not_run_on_cuda(RUNS)
    assert page.paragraphs["cells-summary"] == f"{len(planned)} planned cells, not run."
    assert [row[1] for row in page.rows] == [
        "×".join(map(str, cell.shape)) for cell in sorted(planned, key=lambda cell: math.prod(cell.shape))
    ]


def test_what_the_address_may_not_contain(browse: Callable[..., Page]) -> None:
    page = browse("peer=cudnn&sort=speed")
    assert page.paragraphs["cells-summary"].startswith(
        f"Unknown and ignored: sort=speed, peer=cudnn. {len(CELLS)} cells, "
    )
    assert len(page.rows) == len(CELLS)


def test_headers_controls_and_rows_respond(browse: Callable[..., Page]) -> None:
    """By click and key. The details of a row contain its quartiles."""
    script = """
      const click = (selector) => document.querySelector(selector).click();
      const key = (name) =>
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
      const form = document.getElementById("cells-filter");
      form.peer.value = "onednn";
      form.dispatchEvent(new Event("input"));
      click("th[data-key=onednn] button");
      click("th[data-key=onednn] button");
      document.querySelector("#cells tbody tr:not([hidden])").focus();
      key("ArrowDown");
      document.getElementById("cells-gpu").textContent = location.hash;
    """
    page = browse(script=script)
    chosen = [(run, cell) for run, cell in CELLS if "onednn" in cell.ratios]
    chosen.sort(key=lambda item: item[1].ratios["onednn"]["median"], reverse=True)
    assert page.rows == [expected_row(run, cell) for run, cell in chosen]
    assert page.sorted["onednn"] == "descending"
    assert page.paragraphs["cells-gpu"] == "#peer=onednn&sort=-onednn"
    run, second = chosen[1]
    details = page.paragraphs["cells-details"]
    assert details.startswith(f"{second.operation}; {'×'.join(map(str, second.shape))}, {second.dtype}, ")
    assert f"{second.layout}; {run.device}, {run.date}." in details
    first, last = (second.ratios["onednn"][name] for name in ("q1", "q3"))
    assert f"({first:#.3g}–{last:#.3g})" in details


def write(folder: Path, name: str, machine: dict[str, Any], rows: list[Any], **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine, name: rows, **more}))


def test_a_gpu_that_ran_is_named(tmp_path: Path) -> None:
    """A cell that a GPU has run is no longer listed as not run. Cells that failed are counted."""
    results = json.loads((ROOT / "benchmarks/results/cpu-intel-xeon-avx512-2t/results.json").read_text())
    gpu = results["machine"] | {"device": "cuda", "gpu": "NVIDIA <H100>"}
    row = next(row for row in results["results"] if row["operation"] == "training_forward")
    write(tmp_path / "cpu", "results", results["machine"], [row])
    write(tmp_path / "partial-partial", "results", results["machine"], [row])
    write(tmp_path / "cpu", "memory", results["machine"], [])
    before = benchmark_data.read(tmp_path)
    assert [len(run.cells) for run in before] == [1]
    planned = benchmark_data.not_run_on_cuda(before)
    write(tmp_path / "gpu", "results", gpu, [row], failures=[{"name": "x", "error": "wrong"}])
    after = benchmark_data.read(tmp_path)
    rest = benchmark_data.not_run_on_cuda(after)
    assert len(planned) - len(rest) == 1
    assert after[1].cells[0].key in {cell.key for cell in planned} - {cell.key for cell in rest}
    assert benchmark_cells.gpu_line(after, rest) == (
        f"<strong>NVIDIA GPU</strong>: NVIDIA &lt;H100&gt;; {len(rest)} planned cells not run."
    )
    write(tmp_path / "gpu/graphs", "results", gpu, [row])
    runs = benchmark_cells.markdown_of_runs(benchmark_data.read(tmp_path))
    assert "| NVIDIA <H100> | 1; **1 wrong or not measured** | [results](results/gpu/table.md) |" in runs
    assert "| NVIDIA <H100>, graphs | 1 | [results](results/gpu/graphs/table.md) |" in runs


def test_files_that_are_not_known_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results"):
        benchmark_data.read(tmp_path)
    write(tmp_path / "cpu", "speeds", {}, [])
    with pytest.raises(ValueError, match=r"speeds\.json: no reader for this file; known are results, norms"):
        benchmark_data.read(tmp_path)


def test_text_of_the_results_is_escaped() -> None:
    cell = Cell("<script>", (2, 3), "float32", "channels first", ratios={"torch": {"median": 0.996}})
    assert benchmark_cells.html_row("</table>", cell, ["torch", "kept"]) == (
        "<tr><td>&lt;script&gt;</td><td>2×3</td><td>float32</td><td>channels first</td>"
        '<td>–</td><td class="slower">▼ 1.00</td><td>–</td><td>–</td><td>&lt;/table&gt;</td></tr>'
    )
