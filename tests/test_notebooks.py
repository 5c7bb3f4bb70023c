"""The notebooks of docs/tutorials: they run with Fashion-MNIST and with digits, and committed outputs are clean."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from normfused.cli.demo.data import HOW_TO_INSTALL

FOLDER = Path(__file__).parents[1] / "docs/tutorials"
NAMES = ["batch_norm", "dataset_statistics", "normalizing_images", "training"]
# Runs in the kernel before the first cell: no data set is found, so that the digits are used.
DIGITS = "from pathlib import Path\nfrom normfused.cli.demo import data\ndata.DEBIAN_FOLDER = Path('none')\n"


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.ipynb"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """docs/tutorials/execute.py. Needs the extra ``docs``, and the notebooks ``demo`` and ``data``."""
    for package in ("nbclient", "nbformat", "ipykernel", "matplotlib", "sklearn", "PIL"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("execute_tutorials", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_notebook_is_tested_and_listed() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES
    index = (FOLDER / "index.md").read_text()
    assert all(f"({name}.ipynb)" in index and f"\n{name}\n" in index for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_complete_and_small(name: str) -> None:
    """Needs no extra. Each cell that prints or draws has an output, and no cell has an execution count."""
    notebook = json.loads(path_of(name).read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in code:
        source = "".join(cell["source"])
        draws_or_prints = re.search(r"^\s*(print|plot|plt\.show)\(", source, re.MULTILINE) and "def " not in source
        assert cell["outputs"] or not draws_or_prints, cell["id"]
        assert cell["execution_count"] is None
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 1_500_000


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_clean(tool: ModuleType, name: str) -> None:
    assert tool.noise(tool.read(path_of(name))) == []


def test_noise_is_found(tool: ModuleType) -> None:
    def found(**output: Any) -> list[str]:
        notebook = tool.nbformat.v4.new_notebook(metadata=tool.KERNEL)
        cell = tool.nbformat.v4.new_code_cell(id="cell", outputs=[tool.nbformat.v4.new_output(**output)])
        notebook.cells.append(cell)
        noise: list[str] = tool.noise(notebook)
        return noise

    assert found(output_type="stream", text="the path a/b/c, 1/255, https://host/tmp/x") == []
    assert found(output_type="stream", text="read /tmp/x") == ["cell: '/tmp/' in the output"]
    assert found(output_type="execute_result", data={"text/plain": "<X at 0x7f>"}) == ["cell: 'at 0x7f' in the output"]
    assert found(output_type="stream", name="stderr") == ["cell: a warning or another message on stderr"]
    assert found(output_type="execute_result", execution_count=3) == ["cell: execution count"]
    assert found(output_type="error", ename="ValueError") == ["cell: an exception"]


@pytest.mark.parametrize(
    ("before", "after", "tag", "expected"),
    [
        ("mean 0.2860", "mean 0.2860", "exact", True),
        ("mean 0.2860", "mean 0.2861", "exact", False),
        ("mean 0.2860", "mean 0.2862", "", True),
        ("mean 0.2860", "mean 0.2863", "", False),
        ("mean 0.2860", "mean -0.2860", "", False),
        ("1.25e-03", "1.27e-03", "", True),
        ("1.25e-03", "1.25e-04", "", False),
        ("60,000 images", "60,001 images", "", False),
        ("60,000 images", "60,000 pixels", "", False),
        ("loss  0.9", "loss 0.1", "varies", True),
        ("loss 0.9", "accuracy 0.9", "varies", False),
        ("loss 0.9", "loss 0.9 0.8", "varies", False),
    ],
)
def test_comparison_of_outputs(tool: ModuleType, before: str, after: str, tag: str, expected: bool) -> None:
    assert tool.agree(before, after, [tag]) is expected


def run(tool: ModuleType, name: str, setup: str = "") -> Any:
    notebook = tool.execute(path_of(name), setup)
    assert tool.noise(notebook) == []
    return notebook


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_with_fashion_mnist(tool: ModuleType, name: str) -> None:
    """Its assertions hold, and it prints what is committed."""
    if not tool.dataset_is_installed():
        pytest.skip(f"needs Fashion-MNIST: {HOW_TO_INSTALL}")
    assert list(tool.differences(tool.read(path_of(name)), run(tool, name))) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_with_digits(tool: ModuleType, name: str) -> None:
    notebook = run(tool, name, DIGITS)
    if name != "batch_norm":  # which needs no data set
        first = next(cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs)
        assert tool.text_of(first).startswith("digits")
