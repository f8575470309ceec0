"""A run knows the data that it was trained on, and keeps the scales of its first start."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from como_jax.data.identity import changes, identify
from como_jax.data.sources import EpisodeSource, load_normalizer
from como_jax.errors import RunError
from como_jax.training.run_data import DATA_FILE, changed_since, check_data, read_scales, write_data
from tests.data.robots import add_labels, make_robot


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_robot(tmp_path_factory.mktemp("robots") / "arm")


def test_the_same_data_are_known_again_wherever_they_lie(robot: Path, tmp_path: Path) -> None:
    before = identify(robot)
    assert before["episodes of train"] == 3 and before["steps of val"] == 6
    assert json.loads(json.dumps(before)) == before
    assert changes(before, identify(shutil.copytree(robot, tmp_path / "moved"))) == []
    assert changes(before, identify(make_robot(tmp_path / "again" / "arm"))) == []
    opened = EpisodeSource(robot, "train")
    assert changes(before, identify(robot, [opened])) == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seed": 1}, ["other images", "other actions", "other states", "other statistics", "seed 0, now 1"]),
        ({"lengths": (9, 5, 7)}, ["episodes of train 3, now 2", "steps of train 21, now 14", "steps of val 6, now 7"]),
        ({"instructions": ("push", "pull", "lift", "wave")}, ["other instructions"]),
        ({"action_size": None}, ["other actions", "other statistics", "action_size 3, now none"]),
        ({"height": 32}, ["other images", "height 24, now 32"]),
    ],
)
def test_what_differs_is_named(robot: Path, tmp_path: Path, settings: dict, named: list[str]) -> None:
    found = "; ".join(changes(identify(robot), identify(make_robot(tmp_path / "arm", **settings))))
    assert all(text in found for text in named), found


def test_labels_and_their_model_belong_to_the_data(robot: Path, tmp_path: Path) -> None:
    labelled, other = (
        identify(add_labels(robot, tmp_path / name, parameters=name)) for name in ("of_one_model", "of_another")
    )
    assert changes(labelled, other) == ["model of the labels of_one_model, now of_another"]
    assert "other labels" in "; ".join(changes(identify(robot), labelled))


def saved(workdir: Path, step: int = 2) -> Path:
    (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    return workdir


def test_a_run_with_a_checkpoint_refuses_other_data_by_name(robot: Path, tmp_path: Path) -> None:
    run, before = tmp_path / "run", {"data/arm": identify(robot), "data/hand": identify(robot)}
    run.mkdir()
    write_data(run, before, {}, 0)
    other = {**before, "data/arm": identify(make_robot(tmp_path / "arm", seed=1))}
    # Nothing was trained yet.
    check_data(run, other)
    saved(run)
    check_data(run, before)
    with pytest.raises(RunError, match=r"trained on other data .*: data/arm \(other images; .*`other_data` resumes"):
        check_data(run, other)
    write_data(run, other, {}, 2)
    check_data(run, other)
    with pytest.raises(RunError, match="data/arm"):
        check_data(run, before)
    found = json.loads((run / DATA_FILE).read_text())
    assert found["started"]["datasets"] == before and [entry["step"] for entry in found["resumed"]] == [2]


def test_scales_are_those_of_the_first_start(robot: Path, tmp_path: Path) -> None:
    run, values = saved(tmp_path / "run"), np.random.default_rng(0).normal(size=(5, 3))
    assert read_scales(run) == {}
    first, second = (load_normalizer(robot, "action", kind) for kind in ("min_max", "uniform"))
    write_data(run, {}, {"arm": {"action": first, "state": None}}, 0)
    write_data(run, {}, {"arm": {"action": second, "state": second}, "hand": {"action": second}}, 2)
    found = read_scales(run)
    assert found["arm"]["state"] is None and set(found) == {"arm", "hand"}
    np.testing.assert_array_equal(found["arm"]["action"](values), first(values))
    np.testing.assert_array_equal(found["hand"]["action"].inverse(values), second.inverse(values))


def test_a_run_without_a_checkpoint_starts_afresh(robot: Path, tmp_path: Path) -> None:
    scale = load_normalizer(robot, "action", "min_max")
    write_data(tmp_path, {"arm": identify(robot)}, {"arm": {"action": scale}}, 0)
    assert read_scales(tmp_path) == {}
    write_data(tmp_path, {}, {}, 0)
    assert json.loads((tmp_path / DATA_FILE).read_text())["scales"] == {}


def test_a_damaged_record_of_the_data_is_an_error(tmp_path: Path) -> None:
    for text in ("{", "{}", '{"started": 1, "resumed": [], "scales": {"arm": {"action": {"offset": 1}}}}'):
        (saved(tmp_path / text) / DATA_FILE).write_text(text)
        for read in (read_scales, lambda run: check_data(run, {"arm": {}})):
            with pytest.raises(RunError, match=r"data\.json is damaged"):
                read(tmp_path / text)


def test_what_has_changed_since_is_told_to_those_who_use_the_run(robot: Path, tmp_path: Path) -> None:
    data, run = shutil.copytree(robot, tmp_path / "arm"), saved(tmp_path / "run")
    assert changed_since(run) == []
    write_data(run, {str(data): identify(data), str(tmp_path / "gone"): identify(data)}, {}, 0)
    assert changed_since(run) == []
    shutil.rmtree(data)
    make_robot(data, seed=1)
    [sentence] = changed_since(run)
    assert sentence.startswith(f"{data} is not what {run} was trained on: other images; ")
