"""Elements of an HTML page: a tree that escapes what is put into it, so no name of a model or a type can break out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as Tree

from turbo_gguf.judge import results
from turbo_gguf.judge.gate import FAIL, PASS, WITHIN_ERROR
from turbo_gguf.judge.report import Table

Element = Tree.Element
Child = Element | str

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def el(tag: str, *children: Child, **attributes: object) -> Element:
    """Make an element. ``class_`` is class, other underscores are hyphens; ``None`` leaves an attribute out, a float has two digits."""
    named = {name.rstrip("_").replace("_", "-"): _text(value) for name, value in attributes.items() if value is not None}
    made = Tree.Element(tag, named)
    for child in children:
        add(made, child)
    return made


def add(parent: Element, *children: Child) -> None:
    """Append elements and texts."""
    for child in children:
        if isinstance(child, Tree.Element):
            parent.append(child)
        elif len(parent):
            parent[-1].tail = (parent[-1].tail or "") + _text(child)
        else:
            parent.text = (parent.text or "") + _text(child)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return _CONTROL.sub("\ufffd", str(value))


def words(text: str) -> list[Child]:
    """Split a text with code between backticks."""
    return [el("code", part) if number % 2 else part for number, part in enumerate(text.split("`")) if part]


def table(shown: Table, caption: str = "") -> Element:
    """A table that scrolls by itself, with the first column in place."""
    sides = ["" if number < shown.left else "n" for number in range(len(shown.header))]
    head = el("tr", *(el("th", *words(cell), scope="col", class_=side or None) for cell, side in zip(shown.header, sides, strict=True)))
    made = el("table", el("thead", head), el("tbody", *(_row(row, sides) for row in shown.rows)))
    if caption:
        made.insert(0, el("caption", el("span", *words(caption))))
    return el("div", made, class_="scroll", tabindex=0)


def _row(row: Sequence[str], sides: Sequence[str]) -> Element:
    first, *others = row
    cells = (
        el("td", *words(cell), class_=" ".join(filter(None, (side, _status(cell)))) or None)
        for cell, side in zip(others, sides[1:], strict=True)
    )
    return el("tr", el("th", *words(first), scope="row"), *cells)


def _status(cell: str) -> str:
    """The class of a cell that is the status of a verdict."""
    return f"is-{cell.replace(' ', '-')}" if cell in (PASS, FAIL, WITHIN_ERROR) else ""


def folded(summary: str, *children: Child, opened: bool = False) -> Element:
    """What is shown when its title is clicked."""
    return el("details", el("summary", *words(summary)), *children, open="" if opened else None)


def written(root: Element) -> str:
    """The page as text."""
    return results.DOCTYPE + Tree.tostring(root, encoding="unicode", method="html") + "\n"
