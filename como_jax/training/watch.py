"""What a run should be told of while it trains, short of stopping."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import jax

logger = logging.getLogger(__name__)

COLLAPSED_SHARE = 0.1


class CollapseWatch:
    """Warns of a collapsed codebook: its perplexity was under a tenth of its size for a number of steps on end."""

    def __init__(self, patience: int):
        self._patience = patience
        self._since: int | None = None
        self._warned = False

    def __call__(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of one step; models without a codebook have nothing to collapse."""
        share = metrics.get("perplexity_share")
        if share is None:
            return
        if float(share) >= COLLAPSED_SHARE:
            self._since, self._warned = None, False
            return
        self._since = step if self._since is None else self._since
        if step - self._since + 1 >= self._patience and not self._warned:
            self._warned = True
            logger.warning(
                "Step %d: the codebook has collapsed. Its perplexity has been under %.0f %% of its size for %d steps "
                "(now %.1f %%). Try model.bottleneck.replace_below=0.1, another kind, or a lower learning rate.",
                step,
                100 * COLLAPSED_SHARE,
                step - self._since + 1,
                100 * float(share),
            )
