"""Reads pages of the documentation site: their links and anchors, and the table of benchmark cells."""

from __future__ import annotations

import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Anchors and links of an HTML page, and the state of its table of benchmark cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.paragraphs: dict[str, str] = {}  # by id
        self.rows: list[list[str]] = []  # texts of the visible rows of the table of cells
        self.sorted: dict[str, str] = {}  # aria-sort of each of its columns
        self._paragraph = self._table = ""
        self._in_body = self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values[name] for name in ("href", "src") if name in values]
        if tag == "p":
            self._paragraph = values.get("id", "")
        if tag == "table":
            self._table = values.get("id", "")
        if tag == "tbody":
            self._in_body = self._table == "cells" and "hidden" not in values
        if tag == "th" and self._table == "cells":
            self.sorted[values["data-key"]] = values.get("aria-sort", "")
        if tag == "tr" and self._in_body:
            self._in_cell = "hidden" not in values
            self.rows += [[]] * self._in_cell
        if tag == "td" and self._in_cell:
            self.rows[-1] = [*self.rows[-1], ""]

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._paragraph = ""
        if tag in ("tr", "tbody"):
            self._in_cell = False
        if tag == "tbody":
            self._in_body = False

    def handle_data(self, data: str) -> None:
        if self._paragraph:
            self.paragraphs[self._paragraph] = self.paragraphs.get(self._paragraph, "") + data
        if self._in_cell and self.rows[-1]:
            self.rows[-1][-1] += data


def dead_links(site: Path) -> list[str]:
    """The links of all pages to files and anchors of the site that do not exist."""
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                dead.append(f"{path.relative_to(site.resolve())}: {link}")
    return sorted(set(dead))


def inventory(site: Path) -> set[str]:
    """The names of all Python objects in objects.inv: four lines of text, and a compressed list of objects."""
    content = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = (line.split() for line in zlib.decompress(content).decode().splitlines())
    return {name for name, domain, *_ in lines if domain.startswith("py:")}
