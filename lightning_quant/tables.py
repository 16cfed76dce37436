# SPDX-License-Identifier: Apache-2.0
"""Owns tables: rows of cells as aligned text, and as HTML for notebooks, light or dark, without anything from outside."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A cell with more than its text: what is shown beside it, in HTML alone.

    `bar`: the length of a bar behind the text, in [0, 1]; `good`: its colour, from 0 (red) over amber to 1 (green);
    `title`: what is shown when the pointer rests on it.
    """

    text: str
    bar: float | None = None
    good: float = 1.0
    title: str = ""


Row = Sequence[str | Cell]


def _text(cell: str | Cell) -> str:
    return cell if isinstance(cell, str) else cell.text


def text_table(head: Sequence[str], rows: Sequence[Row], *, right: Collection[str] = (), notes: Sequence[str] = ()) -> str:
    """Aligned columns under a rule, `notes` below; `right`: the names of columns whose cells end at the right (numbers)."""
    cells = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in (head, *cells)) for column in range(len(head))]
    rule = ["-" * width for width in widths]
    lines = []
    for row in (head, rule, *cells):
        places = zip(row, widths, head, strict=True)
        lines.append("  ".join(cell.rjust(w) if name in right else cell.ljust(w) for cell, w, name in places).rstrip())
    return "\n".join([*lines, *notes])


class Tables(str):
    """Several things that show themselves as tables, one below the other, as text and in a notebook."""

    __slots__ = ("parts",)
    parts: tuple[Any, ...]

    @classmethod
    def of(cls, *parts: Any) -> Tables:
        """That of things with `__str__` and `_repr_html_`."""
        made = cls("\n\n".join(str(part) for part in parts))
        made.parts = parts
        return made

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows as text."""
        printer.text("..." if cycle else str(self))

    def _repr_html_(self) -> str:
        """The same, for notebooks."""
        return "<br>".join(part._repr_html_() for part in self.parts)


# Colours are half transparent over whatever the notebook's theme has, and text keeps the theme's own.
_LINE = "border-bottom:1px solid rgba(128,128,128,.35);background:transparent"


def html_table(
    head: Sequence[str],
    rows: Sequence[Row],
    *,
    right: Collection[str] = (),
    notes: Sequence[str] = (),
    caption: str = "",
    total: Row | None = None,
) -> str:
    """The same as an HTML fragment, every text escaped. `total`: a last row, in bold."""
    sides = ["right" if name in right else "left" for name in head]
    top = "".join(f'<th style="text-align:{side}">{html.escape(name)}</th>' for name, side in zip(head, sides, strict=True))
    body = "".join(_html_row(row, sides, "") for row in rows)
    body += "" if total is None else _html_row(total, sides, ";font-weight:600")
    title = f'<div style="font-weight:600">{html.escape(caption)}</div>' if caption else ""
    below = "".join(f'<div style="opacity:.75">{html.escape(note)}</div>' for note in notes)
    return (
        f'<div style="overflow-x:auto">{title}<table style="border-collapse:collapse;white-space:nowrap">'
        f'<thead><tr style="{_LINE}">{top}</tr></thead><tbody>{body}</tbody></table>{below}</div>'
    )


def _html_row(row: Row, sides: Sequence[str], style: str) -> str:
    cells = []
    for cell, side in zip(row, sides, strict=True):
        given = cell if isinstance(cell, Cell) else Cell(cell)
        title = f' title="{html.escape(given.title)}"' if given.title else ""
        wraps = ";white-space:normal" if len(given.text) >= 50 else ""
        cells.append(f'<td style="text-align:{side}{wraps}{_bar(given)}"{title}>{html.escape(given.text)}</td>')
    return f'<tr style="{_LINE}{style}">{"".join(cells)}</tr>'


def _bar(cell: Cell) -> str:
    """A background that is a bar from the left, or none."""
    if cell.bar is None:
        return ""
    length, good = (round(100 * min(max(value, 0.0), 1.0)) for value in (cell.bar, cell.good))
    colour = f"hsla({round(1.3 * good)},75%,45%,.35)"
    return f";background:linear-gradient(90deg,{colour} {length}%,transparent {length}%)"
