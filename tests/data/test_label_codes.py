"""Codes of labels that are not in the codebook."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from como_jax.data.policy_data import PolicyData, open_policy_data
from como_jax.errors import DatasetError
from tests.data.robots import add_labels, make_robot
from tests.export.conftest import Row, change_tables
from tests.policies.smoke_policies import smoke


def open_data(dataset: Path, split: str = "train", **changes: Any) -> PolicyData:
    return open_policy_data(smoke("autoregressive", dataset, **{f"data.{k}": v for k, v in changes.items()}), split)


@pytest.mark.parametrize(
    ("split", "step", "codes", "message"),
    [
        ("train", 2, [3, 16], r"wrong \(train\): episode 'episode 1' has at step 2 the code 16, .* from 0 to 15"),
        ("val", 0, [-1, 3], r"wrong \(val\): episode 'episode 3' has at step 0 the code -1, .* from 0 to 15"),
        ("train", None, None, r"wrong \(train\): not every episode has the 2 codes a step"),
    ],
)
def test_codes_that_no_codebook_has_are_named(
    coded_clips: Path, tmp_path: Path, split: str, step: int | None, codes: list[int] | None, message: str
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(coded_clips, wrong)

    def change(row: Row) -> Row:
        if row["episode_id"] != {"train": "episode 1", "val": "episode 3"}[split]:
            return row
        steps = [list(step) for step in row["latent_codes"]]
        if step is not None:
            steps[step] = codes
        return {**row, "latent_codes": None if step is None else steps}

    change_tables(wrong, change)
    with pytest.raises(DatasetError, match=message):
        open_data(wrong, split=split, latent_only=True)
    other = {"train": "val", "val": "train"}[split]
    assert open_data(wrong, split=other, latent_only=True).parts


def test_codes_that_nobody_uses_may_be_anything(plain_clips: Path, tmp_path: Path) -> None:
    # Steps without label have -1.
    coded = add_labels(plain_clips, tmp_path / "coded", parameters="discrete", codebook_size=16)
    part = open_data(coded, latent_only=True).parts[0]
    assert part.source.latent_codes.min() == -1
    robot = add_labels(make_robot(tmp_path / "plain"), tmp_path / "robot", parameters="discrete", codebook_size=16)
    labels = json.loads((robot / "labels.json").read_text())
    (robot / "labels.json").write_text(json.dumps({**labels, "codebook_size": 2}))
    assert open_data(robot, robot_latents=False).labels is None
    with pytest.raises(DatasetError, match="from 0 to 1"):
        open_data(robot, robot_latents=True)
