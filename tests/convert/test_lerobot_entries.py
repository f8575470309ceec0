"""One damaged entry of LeRobot metadata costs that entry alone and is listed; files are found where they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lerobot_files import (
    LENGTHS,
    TASKS,
    TOP,
    V3_TABLE,
    V3_VIDEO,
    edit_info,
    episode_list,
    rows,
    v2_paths,
    write_episode_list,
    write_json_lines,
    write_table,
    write_v2,
    write_v3,
)

from como_jax.convert.lerobot.builder import (
    OTHER_TABLE,
    OTHER_TASK,
    OTHER_VIDEO,
    UNKNOWN_TASK,
    LeRobot,
    LeRobotSettings,
)
from como_jax.convert.lerobot.metadata import read_metadata
from como_jax.convert.report import SourceOutcome
from como_jax.data.schema import Episode

QUICK = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
NO_INDEX = st.sampled_from([None, math.nan, math.inf, -1, 0.5, "1", "x", [], [1], {}, True])
NO_LINE = st.sampled_from([b"{", b"null", b"[]", b'"text"', b"\xff", b"{} {}", b"\x00", b'{"episode_index"', b"7"])
NUMBERS = sorted(LENGTHS)


def read(source: Path) -> tuple[dict[str, Episode], dict[str, SourceOutcome], list[str]]:
    """Reads all episodes without writing a dataset."""
    builder = LeRobot(source.parent / "out", LeRobotSettings(source=str(source)))
    outcomes = {each.name: SourceOutcome(each.name) for each in builder.sources()}
    episodes = [episode for each in builder.sources() for episode in builder.read(each, outcomes[each.name])]
    return {episode.episode_id: episode for episode in episodes}, outcomes, builder.warnings()


@pytest.fixture(scope="module")
def v2(tmp_path_factory) -> Path:
    return write_v2(tmp_path_factory.mktemp("v2") / "data")


@pytest.fixture(scope="module")
def v3(tmp_path_factory) -> Path:
    return write_v3(tmp_path_factory.mktemp("v3") / "data")


@pytest.fixture(scope="module")
def v3_episodes(v3) -> list[dict[str, Any]]:
    return episode_list(v3)


@QUICK
@given(st.sampled_from(["episodes", "tasks"]), st.integers(0, 2), NO_INDEX | NO_LINE)
def test_a_damaged_line_costs_itself(v2, name, line, damage):
    entries: list[dict[str, Any]] = [
        {"episode_index": index, "tasks": [f"task {index}"], "length": LENGTHS[index]} for index in NUMBERS
    ]
    if name == "tasks":
        entries = [{"task_index": index, "task": f"task {index}"} for index in range(3)]
    lines = [json.dumps(entry).encode() for entry in entries]
    key = f"{name.removesuffix('s')}_index"
    lines[line] = damage if isinstance(damage, bytes) else json.dumps(entries[line] | {key: damage}).encode()
    path = v2 / "meta" / f"{name}.jsonl"
    before = path.read_bytes()
    path.write_bytes(b"\n".join(lines))
    metadata = read_metadata(v2)
    path.write_bytes(before)
    assert [entry.index for entry in metadata.episodes] == NUMBERS
    if name == "tasks":
        assert metadata.tasks == {index: f"task {index}" for index in range(3) if index != line}
    else:
        kept = [(f"task {index}",) if position != line else () for position, index in enumerate(NUMBERS)]
        assert [entry.tasks for entry in metadata.episodes] == kept
    (named,) = [warning for warning in metadata.warnings if f"meta/{name}.jsonl: damaged entries" in warning]
    assert f"line {line + 1} (" in named and ";" not in named


V3_INDICES = ["episode_index", "data/chunk_index", "data/file_index"]
V3_VIDEO_VALUES = [f"videos/{TOP}/{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]


@QUICK
@given(
    st.sampled_from([*V3_INDICES, *V3_VIDEO_VALUES]), st.integers(0, 2), st.sampled_from([None, math.nan, -1.0, 0.25])
)
def test_a_damaged_value_of_a_v3_episode_costs_that_episode(v3, v3_episodes, key, position, damage):
    # All values of a column are floats then, as Pandas writes them.
    entries = [entry | {key: float(entry[key])} for entry in v3_episodes]
    if entries[position][key] == damage:
        return
    entries[position][key] = damage
    write_episode_list(v3, entries)
    episodes, outcomes, warnings = read(v3)
    lost = f"episode_{NUMBERS[position]:06d}"
    assert set(episodes) == {f"episode_{index:06d}" for index in NUMBERS} - {lost}
    if key == "episode_index":
        assert any(f"row {position} (episode_index must be a whole number, got " in warning for warning in warnings)
    else:
        assert len(outcomes[lost].problems) == 1
    assert not any(outcome.problems for name, outcome in outcomes.items() if name != lost)


DISPENSABLE = {"length": [None, -7, 2**50], "dataset_from_index": [None], "tasks": [None, [None], [None, "push"]]}


@QUICK
@given(st.sampled_from([(key, value) for key, values in DISPENSABLE.items() for value in values]), st.integers(0, 2))
def test_a_v3_value_that_an_episode_can_do_without_costs_itself(v3, v3_episodes, damage, position):
    key, value = damage
    entries = [dict(entry) for entry in v3_episodes]
    entries[position][key] = value
    write_episode_list(v3, entries)
    metadata = read_metadata(v3)
    assert [entry.index for entry in metadata.episodes] == NUMBERS
    assert not any(entry.faults for entry in metadata.episodes)
    (named,) = [warning for warning in metadata.warnings if "damaged entries were left out" in warning]
    assert named.endswith(
        f": row {position} ({key} must be {'texts' if key == 'tasks' else 'a whole number'}, got {value!r})"
    )
    # Statistics are not read at all.
    write_episode_list(v3, [entry | {"stats/action/max": None} for entry in v3_episodes])
    assert not any("damaged" in warning for warning in read_metadata(v3).warnings)


@QUICK
@given(
    st.sampled_from([("length", value) for value in (None, -7, "x", 0.5, math.nan, [1], 10**30)])
    | st.sampled_from([("tasks", value) for value in (None, 3, {}, [None], ["push", 7])]),
    st.integers(0, 2),
)
def test_a_v2_value_that_an_episode_can_do_without_costs_itself(v2, damage, line):
    entries: list[dict[str, Any]] = [
        {"episode_index": index, "tasks": [], "length": LENGTHS[index]} for index in NUMBERS
    ]
    entries[line][damage[0]] = damage[1]
    path = v2 / "meta" / "episodes.jsonl"
    before = path.read_bytes()
    write_json_lines(path, entries)
    metadata = read_metadata(v2)
    path.write_bytes(before)
    assert [entry.index for entry in metadata.episodes] == NUMBERS
    assert [entry.length for entry in metadata.episodes if entry.index != NUMBERS[line]] == [
        LENGTHS[index] for index in NUMBERS if index != NUMBERS[line]
    ]
    (named,) = [warning for warning in metadata.warnings if "damaged entries were left out" in warning]
    assert f": line {line + 1} ({damage[0]} must be " in named


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_a_task_without_a_text_is_listed(tmp_path, write):
    source = write(tmp_path / "data")
    tasks = [{"task_index": 0, "task": None}, {"task_index": 1, "task": "pull"}]
    if write is write_v2:
        write_json_lines(source / "meta" / "tasks.jsonl", tasks)
    else:
        write_table(source / "meta" / "tasks.parquet", {key: [each[key] for each in tasks] for key in tasks[0]})
    metadata = read_metadata(source)
    assert metadata.tasks == {1: "pull"}
    (named,) = [warning for warning in metadata.warnings if "damaged" in warning]
    assert named.endswith("(task must be a text, got None)")


@QUICK
@given(st.integers(0, 1), NO_INDEX.filter(lambda value: not isinstance(value, str | list | dict | bool)))
def test_a_damaged_v3_task_costs_its_text(v3, position, damage):
    path = v3 / "meta" / "tasks.parquet"
    before = path.read_bytes()
    numbers = [None if index == position and damage is None else float(index) for index in TASKS]
    if damage is not None:
        numbers[position] = damage
    write_table(path, {"task_index": numbers, "task": list(TASKS.values())})
    metadata = read_metadata(v3)
    path.write_bytes(before)
    assert metadata.tasks == {index: text for index, text in TASKS.items() if index != position}
    assert f"row {position} (task_index must be a whole number, got " in metadata.warnings[0]


def test_a_v3_episode_that_is_listed_at_two_places_is_left_out(tmp_path):
    source = write_v3(tmp_path / "data")
    entries = episode_list(source)
    write_episode_list(source, [*entries, entries[1] | {"episode_index": 1}])
    episodes, outcomes, warnings = read(source)
    assert set(episodes) == {"episode_000002", "episode_000006"}
    assert outcomes["episode_000001"].problems == ["the metadata list it twice, at different places"]
    assert warnings[0].startswith("meta/episodes lists some episodes twice")


@pytest.mark.parametrize("stale", [1, 7])
def test_v3_rows_and_frames_in_a_neighbouring_file_are_found(tmp_path, stale):
    source = write_v3(tmp_path / "data")
    entries = episode_list(source)
    # The episode lies in the second file, or the third, which has another name than the metadata say.
    for template in (V3_TABLE, V3_VIDEO):
        old, new = (source / template.format(video_key=TOP, chunk_index=0, file_index=index) for index in (1, 3))
        old.rename(new)
    for entry in entries[2:]:
        entry["data/file_index"] = entry[f"videos/{TOP}/file_index"] = stale if stale == 7 else 0
    write_episode_list(source, entries)
    episodes, outcomes, _ = read(source)
    assert len(episodes) == 3
    assert [int(step.action[1]) for step in episodes["episode_000006"].steps] == [6] * LENGTHS[6]
    assert {OTHER_TABLE, OTHER_VIDEO} <= set(outcomes["episode_000006"].warnings)
    assert outcomes["episode_000001"].warnings == outcomes["episode_000002"].warnings == []


def test_v3_files_that_are_nowhere_are_missing(tmp_path):
    source = write_v3(tmp_path / "data")
    (source / V3_TABLE.format(chunk_index=0, file_index=1)).unlink()
    episodes, outcomes, _ = read(source)
    assert len(episodes) == 2
    assert outcomes["episode_000006"].problems == ["data/chunk-000/file-001.parquet is missing"]


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_tasks_of_rows_and_of_the_list_are_compared(tmp_path, write):
    source = write(tmp_path / "data")
    if write is write_v2:
        entries = [
            {"episode_index": index, "tasks": ["other" if index == 2 else TASKS[index % 2]]} for index in LENGTHS
        ]
        write_json_lines(source / "meta" / "episodes.jsonl", entries)
    else:
        entries = episode_list(source)
        entries[1]["tasks"] = ["other"]
        write_episode_list(source, entries)
    episodes, outcomes, _ = read(source)
    assert episodes["episode_000002"].language_instruction == "push"
    assert {name: outcome.warnings for name, outcome in outcomes.items()} == {
        "episode_000001": [],
        "episode_000002": [OTHER_TASK],
        "episode_000006": [],
    }


def test_a_task_index_that_no_list_has(tmp_path):
    source = write_v2(tmp_path / "data")
    write_table(v2_paths(source, 2)[0], rows(2, 7) | {"task_index": [9] * 7})
    episodes, outcomes, _ = read(source)
    assert episodes["episode_000002"].language_instruction == "push"
    assert outcomes["episode_000002"].warnings == [UNKNOWN_TASK]


def test_counts_of_info_are_compared_with_what_is_there(tmp_path):
    source = write_v2(tmp_path / "data")
    edit_info(source, total_episodes=5, total_frames=16, total_videos=3)
    assert read(source)[2] == ["meta/info.json counts wrongly: total_episodes is 5, and there are 3"]


@pytest.mark.parametrize(
    ("splits", "validation", "message"),
    [
        ("0:2", None, "splits must be an object, got '0:2'; it was ignored"),
        ({"val": "the rest"}, None, "split 'val' must be START:STOP, got 'the rest'; it was ignored"),
        ({"val": [1, 2]}, None, "split 'val' must be START:STOP, got [1, 2]; it was ignored"),
        ({"val": None}, None, "split 'val' must be START:STOP, got None; it was ignored"),
        ({"val": "2:1"}, None, "split 'val' must be START:STOP, got '2:1'; it was ignored"),
        # Of two, the other one still counts.
        ({"val": "-1", "test": "1:2"}, [1], "split 'val' must be START:STOP, got '-1'; it was ignored"),
        ({"val": "2:9"}, [2], "split 'val' is 2:9, and there are 3 episodes"),
    ],
)
def test_splits_that_say_no_range_cost_themselves(tmp_path, splits, validation, message):
    source = write_v2(tmp_path / "data")
    edit_info(source, splits=splits)
    builder = LeRobot(tmp_path / "out", LeRobotSettings(source=str(source)))
    # Without a range for validation, it is drawn from all episodes.
    expected = [None] * 3 if validation is None else ["val" if i in validation else "train" for i in range(3)]
    assert [each.split for each in builder.sources()] == expected
    assert builder.warnings() == [f"meta/info.json: {message}"]


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_links_to_folders_are_followed_but_not_in_circles(tmp_path, write):
    source = write(tmp_path / "data")
    for number, folder in enumerate([*source.glob("videos/*"), source / "data"]):
        elsewhere = tmp_path / f"disk{number}"
        folder.rename(elsewhere)
        folder.symlink_to(elsewhere)
        (elsewhere / "back").symlink_to(source / "videos")
    (source / "videos" / "up").symlink_to(source)
    (source / "videos" / "root").symlink_to("/")
    (source / "videos" / "itself").symlink_to("itself")
    episodes, _, warnings = read(source)
    assert len(episodes) == 3
    assert {f"videos/{name} leads to a folder that it lies in, and is not followed" for name in ("root", "up")} <= {
        *warnings
    }
