"""LeRobot: the order of rows, the place of frames and the control rate, where the dataset contradicts itself."""

from __future__ import annotations

import math
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_files import (
    FPS,
    LENGTHS,
    TOP,
    V3_VIDEO,
    brightness,
    edit_info,
    episode_list,
    rows,
    v2_paths,
    write_episode_list,
    write_table,
    write_v2,
    write_v3,
    write_video,
)

from como_jax.convert.builder import SourceError
from como_jax.convert.images import decode_image
from como_jax.convert.lerobot.builder import OTHER_INDEX, LeRobot, LeRobotSettings
from como_jax.convert.lerobot.order import (
    FRAMES_WITHOUT_ROWS,
    JUMPS,
    JUMPS_AT_RATE,
    OTHER_CLOCK,
    OTHER_FPS,
    OTHER_UNIT,
    OTHER_VIDEO_RATE,
    find_timing,
    row_times,
    sort_rows,
)
from como_jax.convert.lerobot.placement import MATCHED_BY_NUMBER, VideoLayout, Window
from como_jax.convert.report import SourceOutcome
from como_jax.data.schema import Episode

COUNT = list(range(6))
CLOCK = [0.0, 0.1, 0.2, 0.0, 0.1, 0.2]
BACKWARDS = COUNT[::-1]


def read(source: Path, **settings: Any) -> tuple[dict[str, Episode], dict[str, SourceOutcome]]:
    """Reads all episodes without writing a dataset."""
    builder = LeRobot(source.parent / "out", LeRobotSettings(source=str(source), **settings))
    outcomes = {each.name: SourceOutcome(each.name) for each in builder.sources()}
    episodes = [episode for each in builder.sources() for episode in builder.read(each, outcomes[each.name])]
    return {episode.episode_id: episode for episode in episodes}, outcomes


def check_images(episodes: dict[str, Episode]) -> None:
    """Every image is the one that belongs to the action of its step."""
    for episode in episodes.values():
        for step in episode.steps:
            number, index = map(int, step.action)
            assert abs(decode_image(step.images["top"]).mean() - brightness(index, number)) < 2


@pytest.mark.parametrize(
    ("columns", "order", "warning"),
    [
        ({"timestamp": BACKWARDS}, BACKWARDS, None),
        ({"timestamp": CLOCK, "frame_index": COUNT, "index": COUNT}, COUNT, "`timestamp` does not .*`index`$"),
        ({"timestamp": CLOCK, "frame_index": BACKWARDS}, BACKWARDS, "`timestamp` does not .* that of `frame_index`"),
        ({"timestamp": CLOCK, "frame_index": [0, 1, 2] * 2, "index": COUNT}, COUNT, "`frame_index` and `timestamp` do"),
        ({"timestamp": [0, 2, 4, 1, 3, 5], "frame_index": COUNT, "index": COUNT}, COUNT, "`timestamp` does not"),
        ({"timestamp": COUNT, "frame_index": [0, 2, 4, 1, 3, 5]}, COUNT, "`frame_index` does not .* `timestamp`"),
        ({"frame_index": COUNT, "index": BACKWARDS, "timestamp": BACKWARDS}, BACKWARDS, "`frame_index` does not"),
        ({"timestamp": CLOCK, "frame_index": [0, 1, 2] * 2}, COUNT, "that of the file"),
        ({"timestamp": [0.0, math.nan, 0.2, 0.3, 0.4, 0.5], "index": COUNT}, COUNT, "`timestamp` does not"),
        ({"timestamp": [0.0, None, 0.2, 0.3, 0.4, 0.5], "index": COUNT}, COUNT, "`timestamp` does not"),
        ({"timestamp": [0.0] * 6, "frame_index": COUNT}, COUNT, "`timestamp` is the same in every row"),
        ({"frame_index": [[number] for number in BACKWARDS]}, BACKWARDS, None),
        ({"frame_index": ["a", "b", "c", "d", "e", "f"], "index": COUNT}, COUNT, "`frame_index` does not"),
        ({"other": COUNT}, COUNT, None),
    ],
)
def test_the_order_of_rows_is_that_of_most_columns(columns, order, warning):
    table, warnings = sort_rows(pa.table({**columns, "row": COUNT}))
    assert table["row"].to_pylist() == order
    if warning is None:
        assert warnings == []
    else:
        (said,) = warnings
        assert re.search(warning, said)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"frame_index": BACKWARDS, "index": [0, 2, 4, 1, 3, 5]},
            "`frame_index` and `index` put its rows in different",
        ),
        ({"timestamp": [0.0, 0.3, 0.1, 0.1, 0.4, 0.2]}, "`timestamp` does not number its rows"),
        ({"timestamp": [0.0, math.nan] * 3}, "`timestamp` does not number its rows"),
    ],
)
def test_rows_without_an_order_cost_their_episode(columns, message):
    with pytest.raises(SourceError, match=message):
        sort_rows(pa.table(columns))


def test_timestamps_of_arrow_are_seconds():
    times = pa.array([0, 50_000_000, 100_000_000], pa.timestamp("ns"))
    np.testing.assert_allclose(row_times(pa.table({"timestamp": times})), [0.0, 0.05, 0.1])
    assert row_times(pa.table({"timestamp": [0.0, 0.1, 0.1]})) is None


@pytest.mark.parametrize(
    ("fps", "rows_at", "videos_at", "rate", "warnings"),
    [
        (10, 10, [10], 10, []),
        (10, 10.2, [10], 10, []),
        (10, None, [], 10, []),
        (10, 10, [30], 10, [OTHER_VIDEO_RATE]),
        (10, None, [30], 10, [OTHER_VIDEO_RATE]),
        (20, 10, [10, 10], 10, [OTHER_FPS]),
        (20, 10, [20], 20, [OTHER_CLOCK]),
        (20, 0.02, [20], 20, [OTHER_UNIT]),
        (20, 2e-8, [], 20, [OTHER_UNIT]),
    ],
)
def test_two_clocks_outvote_one(fps, rows_at, videos_at, rate, warnings):
    times = None if rows_at is None else np.arange(6) / rows_at
    found = find_timing(fps, 6, times, [np.arange(6) / each for each in videos_at])
    assert found.rate == pytest.approx(rate) and found.warnings == warnings and not found.starts


@pytest.mark.parametrize("videos_at", [[], [30], [10, 20]])
def test_clocks_that_nothing_decides_between_cost_the_episode(videos_at):
    with pytest.raises(SourceError, match="says 20 Hz, and its timestamps 10 Hz; `control_rate` decides"):
        find_timing(20, 6, np.arange(6) / 10, [np.arange(6) / each for each in videos_at])


@pytest.mark.parametrize(
    ("steps", "starts"),
    [
        ([0, 1, 2, 3, 4, 5], []),
        ([0, 1, 2, 4, 5, 6], [3]),
        ([0, 1, 2, 50, 51, 99], [3, 5]),
        ([0, 1.3, 1.8, 3.2, 3.9, 5], []),  # Clocks tremble.
        ([0, 1, 2.7, 3, 4, 5], []),  # One row is late, the next ones are not.
        ([0, 1, 1.2, 2.2, 3.2, 4.2], [2]),  # One row too many.
        ([0, 1, 2, 2.9, 6, 6.1, 6.2, 7.2, 8.2, 9.2], [4, 5, 6]),
    ],
)
def test_time_jumps_where_steps_do_not_make_up_for_each_other(steps, starts):
    clock = np.array(steps) / 10
    warnings = [JUMPS] if starts else []
    assert find_timing(10, len(clock), clock, []) == (10, starts, warnings)
    # The clocks of the video and of the frame numbers count as that of the rows does.
    assert find_timing(10, len(clock), np.arange(len(clock)) / 10, [clock]) == (10, starts, warnings)
    if not (np.array(steps) % 1).any():
        assert find_timing(10, len(clock), None, [np.arange(99) / 10], np.array(steps)) == (10, starts, warnings)


def test_a_clock_that_is_wrong_does_not_cut():
    slow = np.array([0, 1, 2, 7, 8, 9]) / 5
    assert find_timing(10, 6, slow, [np.arange(6) / 10]) == (10, [], [OTHER_CLOCK])
    assert find_timing(10, 6, np.arange(6) / 10, [slow]) == (10, [], [OTHER_VIDEO_RATE])


def test_every_second_frame_has_a_row():
    numbers = np.array([0, 2, 4, 8, 10, 12])
    assert find_timing(10, 6, numbers / 10, [np.arange(13) / 10], numbers) == (5, [3], [JUMPS])


def place(times: np.ndarray, parts: list[Window], episode: int) -> tuple[int, int, list[str]]:
    return VideoLayout(times, parts, 30.0).place(episode)


def windows(lengths: list[int | None], rate: float = 30.0) -> list[Window]:
    ends = np.cumsum([length or 0 for length in lengths]) / rate
    return [
        Window(index, (end - (length or 0) / rate, end), length)
        for index, (length, end) in enumerate(zip(lengths, ends.tolist(), strict=True))
    ]


@pytest.mark.parametrize(
    ("times", "warned"),
    [
        (np.arange(120) / 30, False),
        (np.arange(120) / 30 + 1000.0, False),
        (np.round(np.arange(120) / 30, 3), False),
        (np.arange(120) * 1.002 / 30, True),
        (np.arange(120) / 25, True),
        (np.arange(120) / 60, True),
        (np.cumsum(np.random.default_rng(0).uniform(0.01, 0.06, 120)), True),
    ],
    ids=["exact", "late", "milliseconds", "29.94", "25", "60", "uneven"],
)
def test_frames_are_found_by_time_or_number(times, warned):
    placed = [place(times, windows([40, 50, 30]), episode) for episode in range(3)]
    assert [each[:2] for each in placed] == [(0, 40), (40, 90), (90, 120)]
    assert any(MATCHED_BY_NUMBER in each[2] for each in placed) == warned


def test_a_long_video_whose_clock_is_off_by_whole_frames():
    """After 1000 frames of a video at 29.97 Hz, a frame lies where the metadata at 30 Hz lead, but the wrong one."""
    times, parts = np.arange(3000) * 1.001 / 30, windows([1000, 1000, 1000])
    assert [place(times, parts, episode)[:2] for episode in range(3)] == [(0, 1000), (1000, 2000), (2000, 3000)]
    # With a frame more, no number is sure.
    with pytest.raises(SourceError, match="no frame of it lies where the metadata say"):
        place(np.arange(3001) * 1.001 / 30, parts, 1)


def test_a_wrong_begin_costs_its_episode_alone():
    times = np.arange(120) / 30
    for shift in (1, -1, 7):
        parts = windows([40, 50, 30])
        moved = tuple(second + shift / 30 for second in parts[1].seconds)
        parts[1] = Window(1, moved, 50)
        assert [place(times, parts, episode)[0] for episode in (0, 2)] == [0, 90]
        with pytest.raises(SourceError, match="no frame of it lies where the metadata say that it begins, at "):
            place(times, parts, 1)


def test_episodes_that_the_metadata_no_longer_list_leave_the_others_in_place():
    parts = windows([40, 50, 30])
    assert place(np.arange(120) / 30, [parts[0], parts[2]], 2) == (90, 120, [])
    unknown = [parts[0], Window(1, parts[1].seconds, None), parts[2]]
    assert place(np.arange(120) / 30, unknown, 2) == (90, 120, [])
    times = np.concatenate([np.arange(60) / 30, 5 + np.arange(60) / 30])
    assert place(times, [Window(0, (0.0, 2.0), None), Window(1, (5.0, 7.0), None)], 1) == (60, 120, [])


def test_a_clock_that_begins_anew_does_not_mix_the_rows(tmp_path):
    source = write_v2(tmp_path / "data")
    clock = [0.0, 0.1, 0.2, 0.3, 0.0, 0.1, 0.2]
    write_table(v2_paths(source, 2)[0], rows(2, 7) | {"timestamp": clock})
    write_table(v2_paths(source, 6)[0], rows(6, 4) | {"timestamp": [0.0, 0.2, 0.1, 0.3], "frame_index": [3, 1, 2, 0]})
    episodes, outcomes = read(source)
    assert [int(step.action[0]) for step in episodes["episode_000002"].steps] == list(range(7))
    check_images(episodes)
    (warning,) = outcomes["episode_000002"].warnings
    assert warning.startswith("`timestamp` does not run on from row to row")
    assert outcomes["episode_000006"].problems == ["`frame_index` and `timestamp` put its rows in different orders"]


@pytest.mark.parametrize("rate", [Fraction(10000, 1001), Fraction(25), Fraction(8)])
def test_v3_videos_at_another_rate_than_their_metadata_keep_their_frames(tmp_path, rate):
    source = write_v3(tmp_path / "data")
    grey = [brightness(index, step) for index in (1, 2) for step in range(LENGTHS[index])]
    write_video(source / V3_VIDEO.format(video_key=TOP, chunk_index=0, file_index=0), grey, rate)
    episodes, outcomes = read(source)
    assert [len(episode.steps) for episode in episodes.values()] == list(LENGTHS.values())
    assert {episode.control_rate for episode in episodes.values()} == {FPS}
    check_images(episodes)
    if rate != Fraction(10000, 1001):
        assert MATCHED_BY_NUMBER in outcomes["episode_000002"].warnings
        assert OTHER_VIDEO_RATE in outcomes["episode_000001"].warnings


def test_v3_episodes_of_a_video_with_a_frame_too_many_are_found_by_time_or_left_out(tmp_path):
    source = write_v3(tmp_path / "data")
    video = source / V3_VIDEO.format(video_key=TOP, chunk_index=0, file_index=0)
    grey = [brightness(index, step) for index in (1, 2) for step in range(LENGTHS[index])]
    write_video(video, [*grey, 200])
    episodes, _ = read(source)
    assert len(episodes) == 3
    check_images(episodes)
    write_video(video, [*grey, 200], Fraction(25))
    # Not within the same second, by which a file is told from the one before.
    os.utime(video, (0, 0))
    episodes, outcomes = read(source)
    assert list(episodes) == ["episode_000006"]
    assert "no frame of it lies where" in outcomes["episode_000002"].problems[0]


def test_v3_times_that_lead_to_the_frame_before(tmp_path):
    source = write_v3(tmp_path / "data")
    entries = episode_list(source)
    for name in ("from", "to"):
        entries[1][f"videos/{TOP}/{name}_timestamp"] -= 1 / FPS
    write_episode_list(source, entries)
    episodes, outcomes = read(source)
    assert list(episodes) == ["episode_000001", "episode_000006"]
    assert "no frame of it lies where" in outcomes["episode_000002"].problems[0]


def test_the_rate_is_that_of_timestamps_and_videos_or_what_was_asked_for(tmp_path):
    source = write_v2(tmp_path / "data")
    edit_info(source, fps=20)
    episodes, outcomes = read(source)
    assert [episode.control_rate for episode in episodes.values()] == pytest.approx([FPS] * 3)
    assert all(OTHER_FPS in outcome.warnings for outcome in outcomes.values())
    episodes, outcomes = read(source, control_rate=5.0)
    assert {episode.control_rate for episode in episodes.values()} == {5.0}
    assert all(outcome.warnings == [] for outcome in outcomes.values())


def test_frames_without_rows_are_left_out_where_frame_index_says_which(tmp_path):
    source = write_v2(tmp_path / "data")
    kept = [0, 1, 5, 6]
    for index, numbers in ((2, kept), (6, list(range(4)))):
        columns = rows(index, 7)
        columns = {key: [values[number] for number in kept] for key, values in columns.items()}
        write_table(v2_paths(source, index)[0], columns | {"frame_index": numbers})
    write_video(v2_paths(source, 6)[1], [brightness(6, step) for step in range(7)])
    episodes, outcomes = read(source)
    parts = [episodes[f"episode_000002/{part:05d}"] for part in range(2)]
    assert [[int(step.action[0]) for step in part.steps] for part in parts] == [kept[:2], kept[2:]]
    check_images(episodes)
    assert {FRAMES_WITHOUT_ROWS, JUMPS} <= set(outcomes["episode_000002"].warnings)
    assert outcomes["episode_000006"].problems == ["the table has 4 rows, but camera 'top' has more frames"]


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_a_pause_ends_an_episode(tmp_path, write):
    """No pair of frames and no chunk of actions lies across it, and no step is lost."""
    source = write(tmp_path / "data")
    table = source / "data" / "chunk-000" / ("file-000.parquet" if write is write_v3 else "episode_000002.parquet")
    columns = pq.ParquetFile(table).read().to_pydict()
    steps = zip(columns["episode_index"], columns["timestamp"], strict=True)
    late = [5.0 if index == 2 and time > 0.25 else 0.0 for index, time in steps]
    write_table(table, columns | {"timestamp": (np.array(columns["timestamp"]) + late).tolist()})
    episodes, outcomes = read(source)
    lengths = {name: len(episode.steps) for name, episode in episodes.items()}
    assert lengths == {"episode_000001": 5, "episode_000002/00000": 3, "episode_000002/00001": 4, "episode_000006": 4}
    check_images(episodes)
    assert {episode.control_rate for episode in episodes.values()} == {FPS}
    assert episodes["episode_000002/00001"].motion[0] == 0
    assert len({episode.language_instruction for name, episode in episodes.items() if "2" in name[:14]}) == 1
    assert outcomes["episode_000002"].warnings == [JUMPS]
    episodes, outcomes = read(source, control_rate=5.0)
    assert len(episodes["episode_000002"].steps) == 7
    assert outcomes["episode_000002"].warnings == [JUMPS_AT_RATE]


def test_v3_rows_that_begin_at_another_index_than_the_metadata_say(tmp_path):
    source = write_v3(tmp_path / "data")
    entries = episode_list(source)
    entries[2]["dataset_from_index"] += 1
    write_episode_list(source, entries)
    _, outcomes = read(source)
    assert [outcome.warnings for outcome in outcomes.values()] == [[], [], [OTHER_INDEX]]
