"""What rollouts leave behind: tables, videos of the episodes and a picture of some of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import av
import chex
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from como_jax.evaluation.rollouts.rollout import Recording
from como_jax.evaluation.rollouts.success import EpisodeResult, RolloutSummary, SuccessRate, summarize
from como_jax.files import write_atomic, write_json, write_text

GRID_EPISODES = 12
_GRID_COLUMNS = 3
_COLOURS = {True: "tab:green", False: "tab:red"}
# Beyond it, the clock of MP4 (32 bits) would run out of numbers.
_MAX_DENOMINATOR = 10_000


class RolloutRecorder:
    """Writes episodes.csv and videos as episodes end, and the rest once all have."""

    def __init__(self, out: epath.PathLike, num_tasks: int, videos: int | None):
        """Writes nothing yet.

        Args:
          out: a directory, which gets the files.
          num_tasks: that episodes are of.
          videos: of how many episodes of every task; None for all.
        """
        self._out, self._videos = epath.Path(out), videos
        self._shown_of_task = -(-GRID_EPISODES // num_tasks)
        self._results: list[EpisodeResult] = []
        self._shown: list[tuple[EpisodeResult, list[np.ndarray]]] = []

    def __call__(self, result: EpisodeResult, recording: Recording) -> None:
        """Takes an episode that has ended."""
        self._results.append(result)
        # Every time, so that an interrupted run keeps what it measured.
        write_text(self._out / "episodes.csv", episodes_csv(sorted(self._results, key=_identity)))
        if result.crashed:
            return
        frames = recording.frames
        if self._videos is None or result.episode < self._videos:
            folder = self._out / "videos"
            folder.mkdir(exist_ok=True)
            name = f"{_file_name(result.task)}-{result.episode:03d}-{result.outcome}.mp4"
            write_atomic(folder / name, lambda file: file.write(encode_video(frames, recording.rate)))
        if result.episode < self._shown_of_task:
            self._shown.append((result, [frames[0], frames[len(frames) // 2], frames[-1]]))

    def finish(self, results: Sequence[EpisodeResult], facts: Mapping[str, Any]) -> RolloutSummary:
        """Writes the tables, summary.json with these facts, and grid.png if any episode finished."""
        summary = summarize(results)
        write_text(self._out / "episodes.csv", episodes_csv(results))
        write_text(self._out / "table.csv", table_csv(summary))
        write_text(self._out / "table.md", table_markdown(summary))
        write_json(self._out / "summary.json", {**facts, **summary_json(summary)})
        if self._shown:
            order = {_identity(result): number for number, result in enumerate(results)}
            shown = sorted(self._shown, key=lambda item: order[_identity(item[0])])
            figure = grid_figure(shown[:GRID_EPISODES])
            write_atomic(self._out / "grid.png", lambda file: figure.savefig(file, format="png", dpi=100))
        return summary


def encode_video(frames: Sequence[np.ndarray], rate: float) -> bytes:
    """An MP4 file, H.264, that shows RGB frames, uint8 `[H, W, 3]`, `rate` of them a second."""
    chex.assert_equal_shape(frames)
    chex.assert_type(frames, np.uint8)
    # Half the resolution of colour, which every player knows, needs an even number of pixels.
    height, width = (side + side % 2 for side in frames[0].shape[:2])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(_MAX_DENOMINATOR))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # With its macroblock tree x264 does not always make equal files of equal frames (11 of 600 at 64 pixels).
        stream.options = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0"}
        for frame in frames:
            padding = ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0))
            picture = np.pad(frame, padding, mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def grid_figure(episodes: Sequence[tuple[EpisodeResult, Sequence[np.ndarray]]]) -> Figure:
    """First, middle and last picture of every episode, framed green where it solved its task and red where not."""
    columns = min(_GRID_COLUMNS, len(episodes))
    rows = -(-len(episodes) // columns)
    figure = Figure(figsize=(4.5 * columns, 2.1 * rows), layout="constrained")
    panels = figure.subfigures(rows, columns, squeeze=False).ravel()
    for panel, (result, pictures) in zip(panels, episodes, strict=False):
        panel.suptitle(
            f"{result.task}, episode {result.episode}: {result.outcome} after {result.steps} steps\n"
            f"{_shorten(result.instruction)}",
            fontsize=8,
        )
        for axes, picture in zip(panel.subplots(1, len(pictures)), pictures, strict=True):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=_COLOURS[result.success], linewidth=3)
    return figure


def episodes_csv(results: Sequence[EpisodeResult]) -> str:
    """One line an episode."""
    names = ("task", "episode", "seed", "success", "steps", "crashed", "reason", "instruction")
    return _csv([names, *([_plain(getattr(result, name)) for name in names] for result in results)])


def table_csv(summary: RolloutSummary) -> str:
    """One line a task, and one for all episodes together."""
    names = ("task", "episodes", "successes", "rate", "mean_steps", "mean_success_steps", "crashed")
    header = (*names[:4], "low", "high", *names[4:])
    lines = []
    for row in _rows(summary):
        values = [getattr(row, name) for name in names]
        lines.append([*values[:4], *(row.interval or (None, None)), *values[4:]])
    return _csv([header, *lines])


def table_markdown(summary: RolloutSummary) -> str:
    """The same for people."""
    title = ("task", "episodes", "success", "95 % interval", "mean length", "of successes", "crashed")
    rows = [title, ("---", *["---:"] * (len(title) - 1))]
    for row in _rows(summary):
        interval = f"{100 * row.interval[0]:.1f} to {100 * row.interval[1]:.1f} %" if row.interval else "-"
        rate = "-" if row.rate is None else f"{100 * row.rate:.1f} %"
        lengths = ("-" if mean is None else f"{mean:.1f}" for mean in (row.mean_steps, row.mean_success_steps))
        rows.append((row.task, str(row.episodes), rate, interval, *lengths, str(row.crashed)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def summary_json(summary: RolloutSummary) -> dict[str, Any]:
    """The same for programs."""

    def values(row: SuccessRate) -> dict[str, Any]:
        names = ("episodes", "crashed", "successes", "rate", "interval", "mean_steps", "mean_success_steps")
        return {name: getattr(row, name) for name in names}

    return {
        "mean_rate_of_tasks": summary.mean_rate,
        "all": values(summary.total),
        "tasks": {row.task: values(row) for row in summary.tasks},
    }


def _rows(summary: RolloutSummary) -> tuple[SuccessRate, ...]:
    return (*summary.tasks, summary.total) if len(summary.tasks) > 1 else summary.tasks


def _identity(result: EpisodeResult) -> tuple[str, int]:
    return result.task, result.episode


def _file_name(task: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in task)


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _plain(value: object) -> object:
    return int(value) if isinstance(value, bool) else value


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
