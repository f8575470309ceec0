"""Tables as text: CSV for programs, Markdown for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    """Rows as CSV; None is an empty cell, and a bool is 0 or 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([int(cell) if isinstance(cell, bool) else cell for cell in row] for row in rows)
    return text.getvalue()


def markdown_table(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """A table whose first row is its header; with `numbers`, all columns but the first are aligned to the right."""
    header, *rest = rows
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in (header, rule, *rest))
