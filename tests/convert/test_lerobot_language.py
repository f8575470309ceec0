"""Language of LeRobot datasets in columns of the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from lerobot_files import write_json_lines, write_v2, write_v3

from como_jax.convert.lerobot.builder import NO_TASK, LeRobot, LeRobotSettings
from como_jax.convert.lerobot.language import CHANGES
from como_jax.convert.report import summarize
from como_jax.data.episode_table import read_episode_table
from como_jax.errors import ConversionError


def add_columns(root: Path, **columns: tuple[str, list[Any]]) -> Path:
    """Adds columns to all tables and to info.json; the values of a column are gone through in turn."""
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    for key, (dtype, _) in columns.items():
        info["features"][key] = {"dtype": dtype, "shape": [1], "names": None}
    path.write_text(json.dumps(info))
    for file in root.glob("data/**/*.parquet"):
        table = pq.read_table(file)
        for key, (_, values) in columns.items():
            table = table.append_column(key, [[values[step % len(values)] for step in range(table.num_rows)]])
        pq.write_table(table, file)
    return root


def convert(root: Path, **chosen: Any) -> tuple[dict[str, Any], list[list[str]]]:
    settings = LeRobotSettings(source=str(root), **({"validation_fraction": 0.0} | chosen))
    out = root.parent / "out"
    report = LeRobot(out, settings).convert()
    rows = read_episode_table(out, "train").to_pylist()
    return report, [[row["language_instruction"], *row["other_instructions"]] for row in rows]


def messages(report: dict[str, Any]) -> list[str]:
    return [warning["message"] for warning in report["warnings"]]


TWO = {"language_instruction": ("string", ["shove"]), "language_instruction_2": ("string", ["", "move"])}


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_columns_hold_further_texts_of_the_task(tmp_path, write):
    report, texts = convert(add_columns(write(tmp_path / "data"), **TWO))
    assert texts == [["pull", "shove", "move"], ["push", "shove", "move"], ["push", "shove", "move"]]
    assert messages(report) == []


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("language_instruction_2", ["move"]),
        ("annotation.task, language_instruction", ["pull", "shove"]),
        ("", [""]),
    ],
)
def test_the_language_chooses(tmp_path, language, expected):
    source = add_columns(write_v2(tmp_path / "data"), **TWO, **{"annotation.task": ("int64", [1])})
    report, texts = convert(source, language=language)
    assert texts == [expected] * 3
    assert messages(report) == []


def test_what_changes_and_what_does_not_exist_is_said(tmp_path):
    source = add_columns(write_v2(tmp_path / "data"), language_instruction=("string", ["push", "pull"]))
    assert CHANGES in messages(convert(source)[0])
    with pytest.raises(ConversionError, match=r"no language key 'instruction' .* did you mean language_instruction"):
        LeRobot(tmp_path / "other", LeRobotSettings(source=str(source), language="instruction")).convert()


def test_language_that_is_lost_is_named_last(tmp_path):
    source = add_columns(write_v2(tmp_path / "data"), prompt=("string", ["push"]))
    write_json_lines(source / "meta" / "tasks.jsonl", [{"task_index": 0, "task": ""}, {"task_index": 1, "task": ""}])
    (source / "meta" / "episodes.jsonl").unlink()
    report, texts = convert(source)
    assert texts == [[""]] * 3
    assert NO_TASK in messages(report)
    last = summarize(report, "OUT")[-1]
    assert last == "NO EPISODE HAS AN INSTRUCTION, although this looks like labels: meta/tasks.jsonl, prompt"
