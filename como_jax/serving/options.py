"""How a served policy acts, whatever computes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class PolicyOptions:
    """What `python -m tools.serve` asks of a policy.

    Attributes:
      execute, ensemble: see `como_jax.policies.controller.ControlConfig`; with both None, the server gives whole chunks
        and the client carries them out.
      dataset: whose scales of actions and states to use, for policies of several robots.
      sampling: settings that differ from the run's, see `como_jax.evaluation.rollouts.sampling`.
      seed: another one gives other noise.
    """

    execute: int | None = None
    ensemble: float | None = None
    dataset: str = ""
    sampling: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0

    @property
    def whole_chunks(self) -> bool:
        """Whether the client carries chunks out."""
        return self.execute is None and self.ensemble is None
