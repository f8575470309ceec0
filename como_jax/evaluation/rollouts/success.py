"""Success rates of episodes, with intervals that say how much they mean."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """How an episode ended.

    Attributes:
      task: name of the environment, as in `tabletop:reach`.
      episode: its number.
      seed: that the environment was reset with.
      instruction: what was asked for; empty if it crashed before that was known.
      steps: actions taken.
      success: whether the task was solved.
      reason: why it crashed; empty if it did not.
    """

    task: str
    episode: int
    seed: int
    instruction: str = ""
    steps: int = 0
    success: bool = False
    reason: str = ""

    @property
    def crashed(self) -> bool:
        """Whether it ended through no doing of the policy."""
        return bool(self.reason)

    @property
    def outcome(self) -> str:
        """In a word."""
        return "crashed" if self.crashed else "success" if self.success else "failure"


@dataclasses.dataclass(frozen=True)
class SuccessRate:
    """Success over episodes. Those that crashed tell nothing of the policy and are counted apart.

    Attributes:
      task: what the episodes have in common.
      episodes: all of them.
      crashed: how many of them crashed.
      successes: how many solved the task.
      mean_steps: of episodes that did not crash; None if all did.
      mean_success_steps: of those that solved the task; None if none did.
    """

    task: str
    episodes: int
    crashed: int
    successes: int
    mean_steps: float | None
    mean_success_steps: float | None

    @classmethod
    def of(cls, task: str, results: Iterable[EpisodeResult]) -> SuccessRate:
        """Of these episodes."""
        results = list(results)
        finished = [result for result in results if not result.crashed]
        steps = [result.steps for result in finished]
        success_steps = [result.steps for result in finished if result.success]
        return cls(
            task=task,
            episodes=len(results),
            crashed=len(results) - len(finished),
            successes=len(success_steps),
            mean_steps=statistics.fmean(steps) if steps else None,
            mean_success_steps=statistics.fmean(success_steps) if success_steps else None,
        )

    @property
    def finished(self) -> int:
        """Episodes that did not crash."""
        return self.episodes - self.crashed

    @property
    def rate(self) -> float | None:
        """Share of finished episodes that solved the task; None if none finished."""
        return self.successes / self.finished if self.finished else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson interval of the rate at 95 %; None if no episode finished."""
        return wilson_interval(self.successes, self.finished) if self.finished else None


@dataclasses.dataclass(frozen=True)
class RolloutSummary:
    """Success by task, and over all episodes together."""

    tasks: tuple[SuccessRate, ...]
    total: SuccessRate

    @property
    def mean_rate(self) -> float | None:
        """Mean over the tasks of which any episode finished, each counting alike; None if there are none."""
        rates = [task.rate for task in self.tasks if task.rate is not None]
        return statistics.fmean(rates) if rates else None


def summarize(results: Sequence[EpisodeResult]) -> RolloutSummary:
    """Success by task, in the order of their first episodes."""
    names = dict.fromkeys(result.task for result in results)
    tasks = tuple(SuccessRate.of(name, (result for result in results if result.task == name)) for name in names)
    return RolloutSummary(tasks, SuccessRate.of("all", results))


def wilson_interval(successes: int, trials: int, confidence: float = _CONFIDENCE) -> tuple[float, float]:
    """Score interval of a binomial proportion (Wilson 1927): where a test of the normal approximation accepts it.

    Raises:
      ValueError: numbers that are no outcome of trials.
    """
    if trials < 1 or not 0 <= successes <= trials or not 0 < confidence < 1:
        raise ValueError(f"no interval of {successes} successes in {trials} trials at a confidence of {confidence}")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share, shrink = successes / trials, 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / shrink
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)
