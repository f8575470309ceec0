"""Results of rollouts: success rates with intervals that say how certain they are, tables, videos and an image grid."""

from __future__ import annotations

import dataclasses
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import av
import chex
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from como_jax.evaluation.tables import csv_text, markdown_table, wilson_interval
from como_jax.files import write_atomic, write_json, write_text

EPISODES_NAME = "episodes.csv"
GRID_EPISODES = 12
_GRID_COLUMNS = 3
_COLOURS = {True: "tab:green", False: "tab:red"}
# With a larger denominator the clock of MP4, which has 32 bits, would overflow.
_MAX_DENOMINATOR = 10_000


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """How an episode ended.

    Attributes:
      task: name of the environment, as in `tabletop:reach`.
      episode: its number.
      seed: the seed with which the environment was reset.
      instruction: what was asked for; empty if the episode crashed before that was known.
      steps: number of actions taken.
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
        """Whether it ended for a reason that is not the policy's."""
        return bool(self.reason)

    @property
    def outcome(self) -> str:
        """One word for how it ended."""
        return "crashed" if self.crashed else "success" if self.success else "failure"


@dataclasses.dataclass(frozen=True)
class Recording:
    """What an episode looked like.

    Attributes:
      frames: uint8 `[H, W, 3]` of the environment's first camera, at the beginning, at the end, and after every step
        that was drawn.
      rate: frames per second.
    """

    frames: Sequence[np.ndarray]
    rate: float


@dataclasses.dataclass(frozen=True)
class SuccessRate:
    """Success over episodes; those that crashed say nothing about the policy and are counted apart.

    Attributes:
      task: what the episodes have in common.
      episodes: number of episodes, crashed ones included.
      crashed: number of episodes that crashed.
      successes: number of episodes that solved the task.
      mean_steps: mean length of the episodes that did not crash; None if all did.
      mean_success_steps: mean length of the episodes that solved the task; None if none did.
    """

    task: str
    episodes: int
    crashed: int
    successes: int
    mean_steps: float | None
    mean_success_steps: float | None

    @classmethod
    def of(cls, task: str, results: Iterable[EpisodeResult]) -> SuccessRate:
        """The rate over these episodes."""
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
        """Number of episodes that did not crash."""
        return self.episodes - self.crashed

    @property
    def rate(self) -> float | None:
        """Share of finished episodes that solved the task; None if none finished."""
        return self.successes / self.finished if self.finished else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson interval of the rate at 95 %; None if no episode finished."""
        return wilson_interval(self.successes, self.finished) if self.finished else None

    def as_json(self) -> dict[str, Any]:
        """All numbers but the name of the task."""
        names = ("episodes", "crashed", "successes", "rate", "interval", "mean_steps", "mean_success_steps")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class RolloutSummary:
    """Success by task, by suite where tasks are of several, and over all episodes together."""

    tasks: tuple[SuccessRate, ...]
    total: SuccessRate
    suites: tuple[SuccessRate, ...] = ()

    @property
    def mean_rate(self) -> float | None:
        """Mean over the tasks with finished episodes, each counting the same; None if there are none."""
        rates = [task.rate for task in self.tasks if task.rate is not None]
        return statistics.fmean(rates) if rates else None

    @property
    def rows(self) -> tuple[SuccessRate, ...]:
        """The rows of a table: every task, every suite and, if there are several tasks, all episodes together."""
        return (*self.tasks, *self.suites, self.total) if len(self.tasks) > 1 else self.tasks


def summarize(results: Sequence[EpisodeResult]) -> RolloutSummary:
    """Success by task, in the order of their first episodes."""
    names = dict.fromkeys(result.task for result in results)
    tasks = tuple(SuccessRate.of(name, (result for result in results if result.task == name)) for name in names)
    return RolloutSummary(tasks, SuccessRate.of("all", results), _suites(results))


def suite_of(task: str) -> str:
    """The suite in the name of a task, as in `libero:libero_goal/7`; empty if it has none."""
    return task.rpartition("/")[0]


def _suites(results: Sequence[EpisodeResult]) -> tuple[SuccessRate, ...]:
    """Success by suite, if there are several."""
    names = [name for name in dict.fromkeys(suite_of(result.task) for result in results) if name]
    rates = [SuccessRate.of(name, (result for result in results if suite_of(result.task) == name)) for name in names]
    return tuple(rates) if len(rates) > 1 else ()


class RolloutRecorder:
    """Writes episodes.csv and videos whenever an episode ends, and the rest when all have ended."""

    def __init__(self, out: epath.PathLike, num_tasks: int, videos: int | None, ended: Sequence[EpisodeResult] = ()):
        """Prepares the recorder; nothing is written yet.

        Args:
          out: a directory, which gets the files.
          num_tasks: number of tasks that the episodes are of.
          videos: number of episodes of every task to write videos of; None for all.
          ended: episodes that are in the directory already, from before it was stopped.
        """
        self._out, self._videos = epath.Path(out), videos
        self._shown_of_task = -(-GRID_EPISODES // num_tasks)
        self._results = list(ended)
        self._shown = [(result, images) for result in ended if (images := self._stored_images(result))]

    def __call__(self, result: EpisodeResult, recording: Recording) -> None:
        """Adds an episode that has ended."""
        self._results.append(result)
        frames = recording.frames
        if not result.crashed:
            if self._videos is None or result.episode < self._videos:
                path = self._video(result)
                path.parent.mkdir(exist_ok=True)
                write_atomic(path, lambda file: file.write(encode_video(frames, recording.rate)))
            if result.episode < self._shown_of_task:
                self._shown.append((result, _for_grid(frames)))
        # At every episode and after its video, so that an interrupted run keeps what it measured.
        write_text(self._out / EPISODES_NAME, episodes_csv(sorted(self._results, key=_identity)))

    def _video(self, result: EpisodeResult) -> epath.Path:
        task = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in result.task)
        return self._out / "videos" / f"{task}-{result.episode:03d}-{result.outcome}.mp4"

    def _stored_images(self, result: EpisodeResult) -> list[np.ndarray]:
        """Images of an episode for the grid, from its video; none if it has no video or no place there."""
        path = self._video(result)
        if result.episode >= self._shown_of_task or not path.exists():
            return []
        with av.open(io.BytesIO(path.read_bytes())) as container:
            return _for_grid([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

    def finish(self, results: Sequence[EpisodeResult], facts: Mapping[str, Any]) -> RolloutSummary:
        """Writes the tables, summary.json with these facts, and grid.png if any episode finished."""
        summary = summarize(results)
        write_text(self._out / EPISODES_NAME, episodes_csv(results))
        write_text(self._out / "table.csv", table_csv(summary))
        write_text(self._out / "table.md", table_markdown(summary))
        found = {
            "mean_rate_of_tasks": summary.mean_rate,
            "all": summary.total.as_json(),
            "suites": {suite.task: suite.as_json() for suite in summary.suites},
            "tasks": {task.task: task.as_json() for task in summary.tasks},
        }
        write_json(self._out / "summary.json", {**facts, **found})
        if self._shown:
            order = {_identity(result): number for number, result in enumerate(results)}
            shown = sorted(self._shown, key=lambda item: order[_identity(item[0])])
            figure = grid_figure(shown[:GRID_EPISODES])
            write_atomic(self._out / "grid.png", lambda file: figure.savefig(file, format="png", dpi=100))
        return summary


def encode_video(frames: Sequence[np.ndarray], rate: float) -> bytes:
    """An MP4 file, H.264, of RGB frames, uint8 `[H, W, 3]`, at `rate` frames per second."""
    chex.assert_equal_shape(frames)
    chex.assert_type(frames, np.uint8)
    # Colour at half the resolution, which every player supports, needs even sides.
    height, width = (side + side % 2 for side in frames[0].shape[:2])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(_MAX_DENOMINATOR))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # With its macroblock tree x264 does not always make equal files from equal frames (11 of 600 at 64 pixels).
        stream.options = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0"}
        for frame in frames:
            padding = ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0))
            image = np.pad(frame, padding, mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def grid_figure(episodes: Sequence[tuple[EpisodeResult, Sequence[np.ndarray]]]) -> Figure:
    """First, middle and last image of every episode, with a green frame if it solved its task and a red one if not."""
    columns = min(_GRID_COLUMNS, len(episodes))
    rows = -(-len(episodes) // columns)
    figure = Figure(figsize=(4.5 * columns, 2.1 * rows), layout="constrained")
    panels = figure.subfigures(rows, columns, squeeze=False).ravel()
    for panel, (result, images) in zip(panels, episodes, strict=False):
        text = result.instruction
        panel.suptitle(
            f"{result.task}, episode {result.episode}: {result.outcome} after {result.steps} steps\n"
            f"{text if len(text) <= 60 else f'{text[:59]}…'}",
            fontsize=8,
        )
        for axes, image in zip(panel.subplots(1, len(images)), images, strict=True):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=_COLOURS[result.success], linewidth=3)
    return figure


def episodes_csv(results: Sequence[EpisodeResult]) -> str:
    """One line per episode."""
    names = ("task", "episode", "seed", "success", "steps", "crashed", "reason", "instruction")
    return csv_text([names, *([getattr(result, name) for name in names] for result in results)])


def table_csv(summary: RolloutSummary) -> str:
    """One line per task, and one for all episodes together; `low` and `high` are the interval of the rate."""
    header = ("task", "episodes", "successes", "rate", "low", "high", "mean_steps", "mean_success_steps", "crashed")
    lines: list[list[object]] = []
    for row in summary.rows:
        low, high = row.interval or (None, None)
        values = {**dataclasses.asdict(row), "rate": row.rate, "low": low, "high": high}
        lines.append([values[name] for name in header])
    return csv_text([header, *lines])


def table_markdown(summary: RolloutSummary) -> str:
    """The same table for people."""
    rows = [("task", "episodes", "success", "95 % interval", "mean length", "of successes", "crashed")]
    for row in summary.rows:
        interval = f"{100 * row.interval[0]:.1f} to {100 * row.interval[1]:.1f} %" if row.interval else "-"
        rate = "-" if row.rate is None else f"{100 * row.rate:.1f} %"
        lengths = ("-" if mean is None else f"{mean:.1f}" for mean in (row.mean_steps, row.mean_success_steps))
        rows.append((row.task, str(row.episodes), rate, interval, *lengths, str(row.crashed)))
    return markdown_table(rows, numbers=True)


def _for_grid(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [frames[0], frames[len(frames) // 2], frames[-1]]


def _identity(result: EpisodeResult) -> tuple[str, int]:
    return result.task, result.episode
