"""Executes the tutorials and writes their outputs without what differs from run to run.

    python docs/tutorials/execute.py [--check] [NOTEBOOK ...]

Outputs are written for Fashion-MNIST only. ``--check`` writes nothing. It fails if a cell raises, or if the text that a
cell prints differs from the committed one. Numbers may differ by two units of their last digit, because another CPU
rounds in another order. Tags of a cell change this: ``exact``: the text must be equal; ``varies``: numbers may have any
value, such as those of a training.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from normfused.cli.demo import idx
from normfused.cli.demo.data import DEBIAN_FOLDER, HOW_TO_INSTALL, TORCHVISION_FOLDER

FOLDER = Path(__file__).parent
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KEPT_OF_A_CELL = {"tags", "mystnb"}
# Absolute paths, addresses of objects, and terminal colors.
NOISE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|var|opt|Users|work)/|[A-Z]:\\|\bat 0x[0-9a-f]+|\x1b\[")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.(\d*))?(?:e([-+]?\d+))?")
UNITS = 2.001  # of the last digit


def notebooks() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def dataset_is_installed() -> bool:
    """Whether the notebooks, which run in their folder, find Fashion-MNIST."""
    folders = (DEBIAN_FOLDER, FOLDER / "data" / TORCHVISION_FOLDER)
    return any(any(folder.glob(idx.MARKER)) for folder in folders)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def execute(path: Path, setup: str = "") -> NotebookNode:
    """The notebook with new, clean outputs. The code ``setup`` runs before its first cell.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    notebook = read(path)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(setup))
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # a printed text may arrive in any number of parts
        resources={"metadata": {"path": str(FOLDER)}},
    )
    # The rounding of sums depends on the number of threads.
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    del notebook.cells[0]
    return clean(notebook)


def clean(notebook: NotebookNode) -> NotebookNode:
    """Remove execution counts and the metadata of editors. Changes the notebook and returns it."""
    notebook.metadata = nbformat.from_dict(KERNEL)
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in KEPT_OF_A_CELL}
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
    return notebook


def noise(notebook: NotebookNode) -> list[str]:
    """What a committed notebook must not contain."""
    found = [] if notebook.metadata == KERNEL else ["metadata of the notebook"]
    for cell in notebook.cells:
        if not cell.metadata.keys() <= KEPT_OF_A_CELL:
            found.append(f"{cell.id}: metadata of the cell")
        if cell.cell_type != "code":
            continue
        if cell.execution_count is not None or any(output.get("execution_count") for output in cell.outputs):
            found.append(f"{cell.id}: execution count")
        if any(output.get("name") == "stderr" for output in cell.outputs):
            found.append(f"{cell.id}: a warning or another message on stderr")
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"{cell.id}: an exception")
        if match := NOISE.search(text_of(cell)):
            found.append(f"{cell.id}: {match[0]!r} in the output")
    return found


def text_of(cell: NotebookNode) -> str:
    """What a cell prints, and the text form of its results. Figures have one too."""
    texts = []
    for output in cell.outputs:
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        texts.append(text)
    return "\n".join(texts)


def differences(committed: NotebookNode, executed: NotebookNode) -> Iterator[str]:
    """A line for each cell whose text differs by more than its tags allow."""
    for before, after in zip(committed.cells, executed.cells, strict=True):
        if before.cell_type == "code" and not agree(text_of(before), text_of(after), before.metadata.get("tags", ())):
            yield f"{before.id}: committed output\n{text_of(before)}\nnew output\n{text_of(after)}"


def agree(before: str, after: str, tags: list[str] | tuple[str, ...] = ()) -> bool:
    if before == after or "exact" in tags:
        return before == after
    words = [NUMBER.sub("#", text).split() for text in (before, after)]
    if words[0] != words[1]:
        return False
    pairs = zip(NUMBER.finditer(before), NUMBER.finditer(after), strict=True)
    return "varies" in tags or all(close(*pair) for pair in pairs)


def close(before: re.Match[str], after: re.Match[str]) -> bool:
    """Whether two numbers differ by a few units of the last digit of the first. Integers must be equal."""
    decimals, exponent = before[1], before[2]
    unit = 10.0 ** (int(exponent or 0) - len(decimals)) if decimals else 0.0
    values = [float(match[0].replace(",", "")) for match in (before, after)]
    return abs(values[0] - values[1]) <= UNITS * unit


def main() -> int:
    parser = argparse.ArgumentParser(description="Executes the tutorials and writes their outputs.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a printed text differs")
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", default=notebooks())
    options = parser.parse_args()
    if not dataset_is_installed():
        parser.error(f"Fashion-MNIST is not installed: {HOW_TO_INSTALL}")
    failed = False
    for path in options.notebooks:
        executed = execute(path)
        found = noise(executed)
        if options.check:
            found += differences(read(path), executed)
        print("\n".join([f"{path.name}: {'ok' if not found else 'failed'}", *found]), flush=True)
        failed = failed or bool(found)
        if not (found or options.check):
            nbformat.write(executed, path)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
