"""Videos whose frames are not shown equally long: their own times count."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from como_jax.convert.images import decode_image
from como_jax.convert.report import SourceOutcome
from como_jax.convert.timing import regular_steps, uneven_rate
from como_jax.convert.video_folder.builder import UNEVEN, UNEVEN_AT_RATE, VideoFolder, VideoFolderSettings
from como_jax.data.schema import Episode


def write_video(path: Path, milliseconds: Sequence[int]) -> None:
    """Writes grey frames, of value 10 times their number, that are shown from the given times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        stream.options = {"crf": "4"}
        for number, time in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read(folder: Path, **settings: object) -> tuple[list[Episode], SourceOutcome]:
    builder = VideoFolder(folder.parent / "out", VideoFolderSettings(source=str(folder), **settings))
    (source,) = builder.sources()
    outcome = SourceOutcome(source.name)
    return list(builder.read(source, outcome)), outcome


def values(episode: Episode) -> list[int]:
    """The numbers of the frames that the steps show."""
    return [round(decode_image(step.images["image"]).mean() / 10) for step in episode.steps]


@pytest.mark.parametrize(
    ("times", "rate"),
    [
        (np.arange(20) / 10, None),
        (np.arange(20) / 10 + np.random.default_rng(0).uniform(-0.02, 0.02, 20), None),
        (np.arange(300) * 1001 / 30000, None),
        (np.round(np.arange(300) / 30, 3), None),
        (None, None),
        (np.array([0.0, 5.0]), None),
        (np.array([0.0, 0.1, 0.2, 0.3, 0.5, 0.6]), 10.0),
        (np.array([0.0, 0.1, 0.2, 5.2, 5.3]), 10.0),
        (np.array([0.0, 0.1, 0.2, 0.21, 0.3, 0.4, 0.5]), 10.0),
    ],
)
def test_only_frames_that_are_not_shown_equally_long_have_times_of_their_own(times, rate):
    assert uneven_rate(times) == (None if rate is None else pytest.approx(rate, rel=0.03))


@pytest.mark.parametrize(
    ("times", "steps"),
    [
        ([0.0, 0.1, 0.2], [(0, 0, 0), (0, 1, 1), (0, 2, 2)]),
        ([7.0, 7.1, 7.4], [(0, 0, 0), (0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 4, 2)]),
        ([0.0, 0.1, 5.1, 5.2], [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)]),
        ([0.0, 0.01, 0.02, 0.1], [(0, 0, 0), (0, 1, 3)]),
        ([0.0, 0.1, 0.0, 0.1], [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)]),
        ([None, None, 0.2], [(0, 0, 0), (0, 1, 1), (0, 2, 2)]),
        ([], []),
    ],
)
def test_steps_show_what_a_player_shows(times, steps):
    assert list(regular_steps(zip(times, range(len(times)), strict=True), 10.0)) == steps


def test_a_pause_ends_an_episode_and_lost_frames_are_held(tmp_path):
    write_video(tmp_path / "clips" / "a.mp4", [0, 100, 200, 300, 500, 600, 700, 5700, 5800, 5900])
    episodes, outcome = read(tmp_path / "clips")
    assert [values(episode) for episode in episodes] == [[0, 1, 2, 3, 3, 4, 5, 6], [7, 8, 9]]
    assert [episode.control_rate for episode in episodes] == pytest.approx([10.0, 10.0])
    assert [episode.episode_id for episode in episodes] == ["a.mp4/00000", "a.mp4/00001"]
    assert UNEVEN in outcome.warnings
    (fast, slow), _ = read(tmp_path / "clips", frame_stride=2)
    assert (values(fast), values(slow)) == ([0, 2, 3, 5], [7, 9])


def test_a_control_rate_that_is_given_counts_every_frame(tmp_path):
    write_video(tmp_path / "clips" / "a.mp4", [0, 100, 200, 300, 5300, 5400, 5500])
    (episode,), outcome = read(tmp_path / "clips", control_rate=4.0)
    assert values(episode) == list(range(7)) and episode.control_rate == 4.0
    assert outcome.warnings == [UNEVEN_AT_RATE]
