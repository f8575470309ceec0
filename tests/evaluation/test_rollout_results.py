"""Success rates and their intervals, and the files of rollouts."""

import csv
import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy import optimize, stats

from como_jax.evaluation.rollouts.results import (
    EpisodeResult,
    Recording,
    RolloutRecorder,
    encode_video,
    summarize,
    table_markdown,
)
from como_jax.evaluation.tables import wilson_interval

RESULTS = [
    EpisodeResult("sim:a", 0, 100, "push, please", 4, success=True),
    EpisodeResult("sim:a", 1, 101, "push", 8),
    EpisodeResult("sim:a", 2, 102, "push", 1, reason="ValueError: bad, very"),
    EpisodeResult("sim:b", 0, 100, "pull", 6, success=True),
]


@pytest.mark.parametrize("successes, trials", [(0, 5), (1, 20), (7, 20), (19, 20), (5, 5), (480, 1000)])
def test_the_interval_is_that_of_the_score_test(successes: int, trials: int):
    z = stats.norm.ppf(0.975)
    share = successes / trials

    def score(truth: float) -> float:
        return (share - truth) ** 2 - z**2 * truth * (1 - truth) / trials

    low = optimize.brentq(score, 1e-12, share - 1e-6) if successes else 0.0
    high = optimize.brentq(score, share + 1e-6, 1 - 1e-12) if successes < trials else 1.0
    np.testing.assert_allclose(wilson_interval(successes, trials), (low, high), atol=1e-9)


@pytest.mark.parametrize("successes, trials", [(0, 0), (3, 2), (-1, 2)])
def test_what_is_no_outcome_of_trials_has_no_interval(successes: int, trials: int):
    with pytest.raises(ValueError):
        wilson_interval(successes, trials)


def test_crashed_episodes_count_neither_as_failures_nor_as_successes():
    results = [
        EpisodeResult("a", 0, 0, steps=10, success=True),
        EpisodeResult("a", 1, 1, steps=30),
        EpisodeResult("a", 2, 2, steps=3, reason="it fell over"),
        EpisodeResult("b", 0, 0, steps=20, success=True),
        EpisodeResult("c", 0, 0, reason="it never began"),
    ]
    summary = summarize(results)
    a, b, c = summary.tasks
    assert (a.task, a.episodes, a.crashed, a.successes, a.rate) == ("a", 3, 1, 1, 0.5)
    assert (a.mean_steps, a.mean_success_steps) == (20.0, 10.0)
    assert a.interval == wilson_interval(1, 2)
    assert (b.rate, b.crashed) == (1.0, 0)
    assert (c.crashed, c.rate, c.interval, c.mean_steps, c.mean_success_steps) == (1, None, None, None, None)
    assert summary.total.rate == pytest.approx(2 / 3) and summary.total.crashed == 2
    assert summary.mean_rate == 0.75
    assert [result.outcome for result in results] == ["success", "failure", "crashed", "success", "crashed"]
    assert summarize(results[-1:]).mean_rate is None


def recording(steps: int, height: int = 64, width: int = 64) -> Recording:
    """From red to blue, with a green corner."""
    frames = []
    for time in range(steps + 1):
        frame = np.zeros((height, width, 3), np.uint8)
        share = time / max(1, steps)
        frame[..., 0], frame[..., 2] = int(255 * (1 - share)), int(255 * share)
        frame[: height // 2, : width // 2] = (0, 200, 0)
        frames.append(frame)
    return Recording(frames, 10.0)


def record(out: Path, results: list[EpisodeResult], **settings) -> RolloutRecorder:
    out.mkdir(exist_ok=True)
    recorder = RolloutRecorder(out, num_tasks=2, **{"videos": None, **settings})
    for result in reversed(results):
        recorder(result, recording(result.steps))
    return recorder


def decode(data: bytes) -> tuple[np.ndarray, float]:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), stream.average_rate


@pytest.mark.parametrize("steps, rate, side", [(0, 10.0, 64), (12, 10.0, 64), (5, 12.5, 65)])
def test_videos_decode_to_the_frames_in_their_colours(steps: int, rate: float, side: int):
    frames = recording(steps, side, side).frames
    decoded, found_rate = decode(encode_video(frames, rate))
    assert decoded.shape == (steps + 1, side + side % 2, side + side % 2, 3)
    error = np.abs(decoded[:, :side, :side].astype(int) - np.stack(frames))
    assert error.mean() < 6 and np.abs(decoded[:, 8:24, 8:24] - np.array([0, 200, 0])).max() < 16
    if steps:
        assert found_rate == rate


def test_everything_is_written(tmp_path: Path):
    summary = record(tmp_path / "out", RESULTS).finish(RESULTS, {"step": 7})
    out = tmp_path / "out"
    names = {"episodes.csv", "table.csv", "table.md", "summary.json", "grid.png", "videos"}
    assert {path.name for path in out.iterdir()} == names
    assert {path.name for path in (out / "videos").iterdir()} == {
        "sim-a-000-success.mp4", "sim-a-001-failure.mp4", "sim-b-000-success.mp4"}  # fmt: skip
    assert len(decode((out / "videos" / "sim-a-001-failure.mp4").read_bytes())[0]) == 9

    rows = list(csv.DictReader(io.StringIO((out / "episodes.csv").read_text())))
    assert list(rows[0]) == ["task", "episode", "seed", "success", "steps", "crashed", "reason", "instruction"]
    found = [(row["task"], row["episode"], row["success"], row["crashed"]) for row in rows]
    assert found == [(r.task, str(r.episode), str(int(r.success)), str(int(r.crashed))) for r in RESULTS]
    assert rows[0]["instruction"] == "push, please" and rows[2]["reason"] == "ValueError: bad, very"

    table = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert [row["task"] for row in table] == ["sim:a", "sim:b", "all"]
    assert (float(table[0]["rate"]), float(table[0]["mean_steps"]), table[0]["crashed"]) == (0.5, 6.0, "1")
    np.testing.assert_allclose([float(table[0]["low"]), float(table[0]["high"])], summary.tasks[0].interval)
    assert "| sim:a | 3 | 50.0 % | 9.5 to 90.5 % | 6.0 | 4.0 | 1 |" in (out / "table.md").read_text()
    values = json.loads((out / "summary.json").read_text())
    assert values["step"] == 7 and values["mean_rate_of_tasks"] == 0.75 and values["tasks"]["sim:b"]["rate"] == 1.0


def test_the_grid_is_framed_by_success(tmp_path: Path):
    def colours(results: list[EpisodeResult], name: str) -> tuple[int, int]:
        record(tmp_path / name, results).finish(results, {})
        pixels = np.array(Image.open(tmp_path / name / "grid.png").convert("RGB")).reshape(-1, 3)
        return tuple(int((pixels == colour).all(1).sum()) for colour in ((44, 160, 44), (214, 39, 40)))

    green, red = colours(RESULTS[:1], "success")
    assert green > 300 and red == 0
    green, red = colours(RESULTS[1:2], "failure")
    assert green == 0 and red > 300


def test_as_many_videos_as_asked_for_are_written(tmp_path: Path):
    record(tmp_path / "one", RESULTS, videos=1)
    assert sorted(path.name[:9] for path in (tmp_path / "one/videos").iterdir()) == ["sim-a-000", "sim-b-000"]
    record(tmp_path / "none", RESULTS, videos=0)
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["episodes.csv"]


def test_an_interrupted_run_keeps_the_list_of_its_episodes(tmp_path: Path):
    record(tmp_path, RESULTS[1:3])
    lines = (tmp_path / "episodes.csv").read_text().splitlines()
    assert [line[:8] for line in lines[1:]] == ["sim:a,1,", "sim:a,2,"]


def test_tables_without_any_finished_episode_have_no_numbers(tmp_path: Path):
    crashed = RESULTS[2:3]
    assert table_markdown(summarize(crashed)).splitlines()[-1] == "| sim:a | 1 | - | - | - | - | 1 |"
    record(tmp_path, crashed).finish(crashed, {})
    assert json.loads((tmp_path / "summary.json").read_text())["all"]["rate"] is None
    assert not (tmp_path / "grid.png").exists()


def test_tasks_of_several_suites_have_a_row_for_each_suite():
    results = [EpisodeResult(f"sim:{task}", 0, 0, "", 4, task != "x/2") for task in ("x/1", "x/2", "y/1", "z")]
    assert [row.task for row in summarize(results).rows[4:]] == ["sim:x", "sim:y", "all"]
    assert [suite.rate for suite in summarize(results).suites] == [0.5, 1.0]
    # One suite alone is all.
    assert [row.task for row in summarize(results[:2]).rows] == ["sim:x/1", "sim:x/2", "all"]
