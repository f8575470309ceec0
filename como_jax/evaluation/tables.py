"""Tables as text, CSV for programs and Markdown for people, and the intervals of the shares in them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from scipy import stats


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


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Score interval of a binomial proportion at 95 % (Wilson 1927).

    Raises:
      ValueError: numbers that are no outcome of trials.
    """
    interval = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
