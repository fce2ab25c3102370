"""A page as a browser's parser sees it, but strict: an element that is not closed, or closed by another, is an error."""

from __future__ import annotations

from html.parser import HTMLParser
from xml.etree import ElementTree as Tree

VOID = {"meta", "br", "link", "img", "input", "hr"}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.builder = Tree.TreeBuilder()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        if tag in VOID:
            self.builder.end(tag)
        else:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.builder.end(self.open.pop())

    def handle_data(self, data: str) -> None:
        if self.open:
            self.builder.data(data)


def tree(page: str) -> Tree.Element:
    """The root of a page."""
    assert page.startswith("<!DOCTYPE html>\n")
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open, f"never closed: {reader.open}"
    return reader.builder.close()


def text(element: Tree.Element) -> str:
    """All words of an element, in order."""
    return " ".join("".join(element.itertext()).split())


def rows(table: Tree.Element) -> dict[str, dict[str, str]]:
    """Cells by the first cell of their row and by the heading of their column."""
    header, *body = ([text(cell) for cell in row] for row in table.iter("tr"))
    return {cells[0]: dict(zip(header, cells, strict=True)) for cells in body}


def section(root: Tree.Element, name: str) -> Tree.Element:
    """A section by its name; an error when the page lacks it."""
    (found,) = (one for one in root.iter("section") if one.get("id") == name)
    return found
