"""What all builders that record demonstrations in a simulator ask of their settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from como_jax.envs.base import MAX_DEMONSTRATION_SEED, SEED_STRIDE
from como_jax.errors import ConversionError


class DemonstrationSettings(Protocol):
    """How many episodes of which tasks, their seed, and the noise on every action."""

    episodes: int
    tasks: tuple[str, ...]
    seed: int
    noise: float


def check_demonstrations(settings: DemonstrationSettings, tasks: Sequence[str]) -> None:
    """Raises ConversionError unless the settings make sense for a simulator that has `tasks`."""
    if not 1 <= settings.episodes <= SEED_STRIDE:
        raise ConversionError(f"episodes must lie between 1 and {SEED_STRIDE}, got {settings.episodes}")
    unknown = [task for task in settings.tasks if task not in (*tasks, "all")]
    if unknown or not settings.tasks:
        raise ConversionError(f"unknown tasks {unknown}; there are all, {', '.join(tasks)}")
    if not (math.isfinite(settings.noise) and settings.noise >= 0):
        raise ConversionError(f"noise must not be negative, got {settings.noise}")
    if not 0 <= settings.seed <= MAX_DEMONSTRATION_SEED:
        raise ConversionError(f"seed must lie between 0 and {MAX_DEMONSTRATION_SEED}, got {settings.seed}")
