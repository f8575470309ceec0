"""Which seeds of an environment are whose, so that a policy is never evaluated on what it was trained on.

Demonstrations have those from 0 up to `FIRST_ROLLOUT_SEED`, `SEED_STRIDE` for each of their datasets; rollouts have
the same number each from there on.
"""

from __future__ import annotations

SEED_STRIDE = 1_000_000
FIRST_ROLLOUT_SEED = 900_000_000
MAX_DEMONSTRATION_SEED = FIRST_ROLLOUT_SEED // SEED_STRIDE - 1
"""The largest `--seed` of a dataset of demonstrations."""
