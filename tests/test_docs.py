"""The Python code of README.md and of the pages in docs/ runs as it is printed."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A block of code; of an interactive session, its output would be needed too.
BLOCK = re.compile(r"^```python\n(?!>>>)(.*?)^```", re.DOTALL | re.MULTILINE)
# Code that a page does not show, in a comment before its first block.
SETUP = re.compile(r"<!-- setup\n(.*?)-->", re.DOTALL)


# Distributions that the tests do not install.
NEEDS = {ROOT / "docs/migrate/timm.md": "timm"}


def code_of(page: Path) -> str:
    """The code of a page, with empty lines in place of its text, so that tracebacks name the lines of the page."""
    text = page.read_text()
    lines = [""] * (text.count("\n") + 1)
    for match in [*SETUP.finditer(text), *BLOCK.finditer(text)]:
        first = text.count("\n", 0, match.start(1))
        block = match[1].splitlines()
        lines[first : first + len(block)] = block
    return "\n".join(lines)


@pytest.mark.parametrize("page", [p for p in PAGES if code_of(p).strip()], ids=lambda p: str(p.relative_to(ROOT)))
def test_code_runs_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page in NEEDS:
        try:
            metadata.version(NEEDS[page])
        except metadata.PackageNotFoundError:
            pytest.skip(f"needs {NEEDS[page]}")
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(page), page, "exec"), {"__name__": "page"})


def test_every_page_is_reachable() -> None:
    """Every page is in a table of contents, under its name without the suffix."""
    listed = {ROOT / "docs/index.md"}
    for page in PAGES[1:]:
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{entry}.md").resolve() for entry in entries}
    assert set(PAGES[1:]) == {page for page in listed if page.exists()}


def test_llms_txt_links_to_pages() -> None:
    links = re.findall(r"\]\(([\w/]+)\.html\)", (ROOT / "docs/llms.txt").read_text())
    assert len(links) > 15
    assert [link for link in links if not (ROOT / f"docs/{link}.md").exists()] == []
