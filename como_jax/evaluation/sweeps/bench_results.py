"""Outcomes of the policy bench, one row an episode, and the table of what they say.

The file of outcomes is small enough to be kept with the code. Runs that are complete in it need not be run again, and
all intervals can be computed again from it.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath
from scipy import stats

from como_jax.errors import UsageError
from como_jax.evaluation.rollouts import resuming
from como_jax.evaluation.tables import csv_text, markdown_table, wilson_interval
from como_jax.files import write_text

_RESAMPLES = 10_000


class Run(NamedTuple):
    """One trained policy."""

    policy: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folders."""
        return f"{self.policy}_{self.arm}_{self.seed}"


class Episode(NamedTuple):
    """One rollout, and whether it solved its task; `success` is None where the simulator crashed.

    Attributes:
      suite, task: as in `libero_spatial` and `3`, or `tabletop` and `reach`.
      state: number of the episode, which fixes where things are.
      seed, policy, arm: of the run.
    """

    suite: str
    task: str
    state: int
    seed: int
    policy: str
    arm: str
    success: bool | None

    @property
    def run(self) -> Run:
        """The policy that acted."""
        return Run(self.policy, self.arm, self.seed)

    @property
    def place(self) -> tuple[str, str, int, int]:
        """What other arms have in common with it: task, state and seed."""
        return self.suite, self.task, self.state, self.seed


def read_episodes(path: epath.PathLike) -> list[Episode]:
    """The outcomes in a file; none where there is no file.

    Raises:
      UsageError: the file is no table of outcomes; the message names the line.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    reader = csv.DictReader(io.StringIO(path.read_text()))
    if tuple(reader.fieldnames or ()) != Episode._fields:
        raise UsageError(f"{path} must be a table with the columns {', '.join(Episode._fields)}.")
    episodes = []
    for row in reader:
        try:
            success = {"": None, "0": False, "1": True}[row["success"]]
            numbers = {"state": int(row["state"]), "seed": int(row["seed"]), "success": success}
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}, line {reader.line_num}: {row} is no outcome of an episode.") from error
        episodes.append(Episode(**{**row, **numbers}))
    return episodes


def write_episodes(path: epath.PathLike, episodes: Iterable[Episode]) -> None:
    """Writes outcomes, in order, each once."""
    rows = sorted(set(episodes), key=lambda episode: (episode.run, episode.suite, episode.task, episode.state))
    write_text(epath.Path(path), csv_text([Episode._fields, *rows]))


def episodes_of_rollouts(folder: Path, run: Run) -> list[Episode]:
    """What `experiments.rollout` has found of a run up to now."""
    episodes = []
    for result in resuming.read_episodes(epath.Path(folder)):
        family, _, name = result.task.partition(":")
        suite, _, task = name.rpartition("/")
        success = None if result.crashed else result.success
        episodes.append(Episode(suite or family, task, result.episode, run.seed, run.policy, run.arm, success))
    return episodes


def complete_runs(episodes: Iterable[Episode], count: int) -> list[Run]:
    """The runs of which so many episodes are known."""
    numbers: dict[Run, int] = {}
    for episode in episodes:
        numbers[episode.run] = numbers.get(episode.run, 0) + 1
    return [run for run, number in numbers.items() if number >= count]


def paired_difference(episodes: Iterable[Episode], others: Iterable[Episode]) -> tuple[float, float, float] | None:
    """Mean difference of success between two arms, and its 95 % interval.

    Episodes of equal task, state and seed are compared, and those pairs are drawn again (percentile bootstrap, Efron
    1979). So the interval holds for these seeds of training, and says little about others where seeds are few.

    Returns:
      Difference, lower and upper end, all in [-1, 1]; None where fewer than two pairs have ended.
    """
    first, second = (
        {item.place: item.success for item in items if item.success is not None} for items in (episodes, others)
    )
    differences = np.array([float(first[place]) - float(second[place]) for place in first if place in second])
    if len(differences) < 2:
        return None
    mean = float(differences.mean())
    if np.ptp(differences) == 0:
        return mean, mean, mean
    found = stats.bootstrap((differences,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=0)
    return mean, float(found.confidence_interval.low), float(found.confidence_interval.high)


def table(episodes: Sequence[Episode], arms: Sequence[str], metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Success by policy and arm in Markdown: all numbers in percent, differences from the arm `none` in points.

    Args:
      episodes: of one suite or simulator.
      arms: in the order of the rows; an arm without episodes has none.
      metrics: of the model that labelled an arm's videos, as `experiments.evaluate` wrote them.
    """
    tasks = list(dict.fromkeys(episode.task for episode in sorted(episodes, key=lambda each: _natural(each.task))))
    titles = ["policy", "videos labelled by", "success", "95 %", "by seed", "against none", *tasks, "LP-MSE", "S-PCFC"]
    rows = []
    for policy in dict.fromkeys(episode.policy for episode in episodes):
        of_policy = [episode for episode in episodes if episode.policy == policy]
        baseline = [episode for episode in of_policy if episode.arm == "none"]
        for arm in arms:
            mine = [episode for episode in of_policy if episode.arm == arm]
            if mine:
                rows.append([policy, arm, *_cells(mine, baseline, tasks), *_metric_cells(metrics.get(arm))])
    return markdown_table([titles, *rows])


def read_metrics(folder: Path) -> dict[str, float]:
    """What `experiments.evaluate` measured; nothing where it has not run."""
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _cells(mine: list[Episode], baseline: list[Episode], tasks: Sequence[str]) -> list[str]:
    seeds = sorted({episode.seed for episode in mine})
    by_seed = [_rate(episode for episode in mine if episode.seed == seed) for seed in seeds]
    known = [100 * rate for rate in by_seed if rate is not None]
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    ended = [episode for episode in mine if episode.success is not None]
    low, high = wilson_interval(sum(bool(episode.success) for episode in ended), len(ended)) if ended else (0.0, 1.0)
    found = None if mine[0].arm == "none" else paired_difference(mine, baseline)
    against = "" if found is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * number for number in found))
    by_task = [_percent(_rate(episode for episode in mine if episode.task == task)) for task in tasks]
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    return [_percent(_rate(mine)) + spread, interval, ", ".join(map(_percent, by_seed)), against, *by_task]


def _metric_cells(metrics: Mapping[str, float] | None) -> list[str]:
    return [f"{metrics['lp_mse']:.4f}", f"{metrics['s_pcfc']:.2f}"] if metrics else ["", ""]


def _rate(episodes: Iterable[Episode]) -> float | None:
    outcomes = [bool(episode.success) for episode in episodes if episode.success is not None]
    return sum(outcomes) / len(outcomes) if outcomes else None


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.1f}"


def _natural(task: str) -> tuple[bool, int, str]:
    """Numbers by size, and names after them in their order."""
    return (not task.isdecimal(), int(task) if task.isdecimal() else 0, "" if task.isdecimal() else task)
