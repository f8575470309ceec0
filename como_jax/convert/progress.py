"""The progress bar of a conversion."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from types import TracebackType

from tqdm import tqdm

from como_jax.convert.report import SourceOutcome


class Progress:
    """Sources that are done, of all, with rate and time left; beside them episodes and sources with problems."""

    def __init__(self, total: int, done: Iterable[SourceOutcome] = (), show: bool = True):
        """Draws the bar.

        Args:
          total: number of sources.
          done: outcomes of an earlier run, which count as done but not for the rate.
          show: whether to draw anything at all.
        """
        done = list(done)
        self._counts: Counter[str] = Counter()
        # A log file should not fill up with progress bars.
        pace = 0.1 if sys.stderr.isatty() else 30
        self._bar = tqdm(total=total, initial=len(done), disable=not show, unit="source", mininterval=pace)
        for outcome in done:
            self._count(outcome)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def add(self, outcome: SourceOutcome) -> None:
        """Counts one more source."""
        self._count(outcome)
        self._bar.update()

    def _count(self, outcome: SourceOutcome) -> None:
        self._counts["episodes"] += outcome.episodes
        self._counts["with problems"] += bool(outcome.problems)
        self._bar.set_postfix(self._counts, refresh=False)
