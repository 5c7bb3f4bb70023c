"""Pages for Markdown files outside docs/, and links to them.

A page whose only content is an ``include`` directive shows the included file. Links in that file are relative to its
own folder, as they must be in a checkout. Links of all pages to such files are pointed at their pages. Links to other
files of the repository, which have no page, become plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
INCLUDE = re.compile(r"```\{include\} (\S+)\n```\s*")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
CODE_BLOCK = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def included_file(page: Path) -> Path | None:
    """The file that a page shows, if that is all it does."""
    match = INCLUDE.fullmatch(page.read_text())
    return (page.parent / match[1]).resolve() if match else None


def pages() -> dict[Path, Path]:
    """The page of each file that has one."""
    return {file: page for page in DOCS.rglob("*.md") if (file := included_file(page))}


def rewrite_links(text: str, folder: Path, page: Path, page_of: dict[Path, Path]) -> str:
    """Point the links of a text in `folder` from `page` at pages and images."""

    def rewrite(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups()
        path = (folder / target).resolve()
        path = page_of.get(path, path)
        if not (image or path.is_relative_to(DOCS)):
            if not path.exists():
                raise FileNotFoundError(f"{page}: the link to {target} leads nowhere")
            return label
        return f"{image}[{label}]({os.path.relpath(path, page.parent)}{anchor or ''})"

    parts = CODE_BLOCK.split(text)  # code at odd indices
    return "".join(part if i % 2 else LINK.sub(rewrite, part) for i, part in enumerate(parts))


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    page = Path(app.env.doc2path(docname)).resolve()
    if page.suffix != ".md":
        return
    file = included_file(page)
    if file:
        app.env.note_dependency(str(file))
        source[0] = file.read_text()
    source[0] = rewrite_links(source[0], (file or page).parent, page, app.repository_pages)


def find(app: Sphinx) -> None:
    app.repository_pages = pages()


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", find)
    app.connect("source-read", read)
    return {"parallel_read_safe": True}
