"""What a policy's run says about how to act, written and read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from como_jax.errors import ConfigError, RunError
from como_jax.spec.interface import POLICY_FILE, History, NormStats, PolicySpec, observation_arrays
from como_jax.spec.normalization import AffineNormalizer, UniformNormalizer

ARM = NormStats(
    AffineNormalizer.fit("mean_std", {"mean": [1, 2], "std": [3, 0]}),
    AffineNormalizer.fit("mean_std", {"mean": [1], "std": [2]}),
)
HAND = NormStats(AffineNormalizer.fit("none", {"mean": [0, 0, 0]}), None)
SPEC = PolicySpec(
    cameras=("front", "wrist"),
    image_size=64,
    fit="stretch",
    instants=2,
    stride=3,
    chunk=8,
    action_size=3,
    state_size=1,
    control_rate=12.5,
    uses_text=True,
    robots={"arm": ARM, "hand": HAND},
)


def save(spec: PolicySpec, workdir: Path) -> None:
    (workdir / POLICY_FILE).write_text(json.dumps(spec.to_json()))


def read_json(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / POLICY_FILE).read_text())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    save(SPEC, tmp_path)
    found = PolicySpec.load(tmp_path)
    assert dataclasses.replace(found, robots=SPEC.robots) == SPEC and list(found.robots) == ["arm", "hand"]
    values = np.random.default_rng(0).normal(size=(5, 2))
    np.testing.assert_array_equal(found.robots["arm"].action(values), ARM.action(values))
    np.testing.assert_array_equal(found.robots["arm"].action.inverse(values), ARM.action.inverse(values))
    np.testing.assert_array_equal(found.robots["arm"].state(values[:, :1]), ARM.state(values[:, :1]))
    assert found.robots["hand"].state is None
    written = read_json(tmp_path)
    save(found, tmp_path)
    assert read_json(tmp_path) == written


def test_quantiles_are_read_as_they_were_written(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    scale = UniformNormalizer.fit(values)
    save(dataclasses.replace(SPEC, robots={"arm": NormStats(scale, None)}), tmp_path)
    found = PolicySpec.load(tmp_path).robots["arm"].action
    np.testing.assert_array_equal(found(values), scale(values))
    np.testing.assert_array_equal(found.inverse(values), scale.inverse(values))


def test_a_policy_may_have_no_robots(tmp_path: Path) -> None:
    save(dataclasses.replace(SPEC, robots={}, action_size=0), tmp_path)
    assert PolicySpec.load(tmp_path).robots == {}


def test_a_directory_without_policy_is_no_policy(tmp_path: Path) -> None:
    for workdir in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=f"{workdir} holds no policy: it has no policy.json"):
            PolicySpec.load(workdir)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file holds no policy"):
        PolicySpec.load(tmp_path / "file")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"cameras": [], "robots": []}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / POLICY_FILE).write_bytes(text)
    with pytest.raises(RunError, match=f"{tmp_path}/policy.json is damaged or of another version"):
        PolicySpec.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"cameras": 3},
        {"robots": []},
        {"robots": {"arm": {}}},
        {"robots": {"arm": None}},
        {"robots": {"arm": {"action": None, "state": None}}},
        {"robots": {"arm": {"action": {"offset": [0], "scale": [1, 2], "varies": [True]}, "state": None}}},
        {"robots": {"arm": {"action": {"offset": ["x"], "scale": [1], "varies": [True]}, "state": None}}},
        {"robots": {"arm": {"action": {"edges": [[1, 0]]}, "state": None}}},
        {"number_of_arms": 2},
    ],
)
def test_a_file_of_other_fields_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    save(SPEC, tmp_path)
    (tmp_path / POLICY_FILE).write_text(json.dumps({**read_json(tmp_path), **changes}))
    with pytest.raises(RunError, match="policy.json is damaged or of another version"):
        PolicySpec.load(tmp_path)


def test_a_field_that_lacks_is_named(tmp_path: Path) -> None:
    save(SPEC, tmp_path)
    for name in read_json(tmp_path):
        (tmp_path / "other").mkdir(exist_ok=True)
        values = {key: value for key, value in read_json(tmp_path).items() if key != name}
        (tmp_path / "other" / POLICY_FILE).write_text(json.dumps(values))
        with pytest.raises(RunError, match=f"policy.json is damaged .*'{name}'"):
            PolicySpec.load(tmp_path / "other")


def test_runs_of_before_robots_had_that_name_are_read(tmp_path: Path) -> None:
    values = SPEC.to_json()
    values["scales"] = values.pop("robots")
    (tmp_path / POLICY_FILE).write_text(json.dumps(values))
    assert PolicySpec.load(tmp_path).to_json() == SPEC.to_json()


def test_robots_are_chosen_by_the_name_of_their_dataset() -> None:
    assert SPEC.choose_robot("hand") == "hand"
    assert dataclasses.replace(SPEC, robots={"arm": ARM}).choose_robot() == "arm"
    with pytest.raises(ConfigError, match="several robot datasets; choose one of arm, hand"):
        SPEC.choose_robot()
    with pytest.raises(ConfigError, match="'han'; choose one of arm, hand; did you mean hand?"):
        SPEC.choose_robot("han")


def test_a_robot_s_own_sizes_may_be_smaller() -> None:
    sizes = [(spec.action_size, spec.state_size) for spec in (SPEC.sized_for(ARM), SPEC.sized_for(HAND))]
    assert sizes == [(2, 1), (3, 0)]


def test_what_the_network_is_given_is_normalised_and_filled_up() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 2, 64, 64, 3), dtype=np.uint8)
    histories = [
        History([{"front": image, "wrist": 255 - image} for image in pair], np.array([[3.0], [5.0]]), "go")
        for pair in images
    ]
    spec = dataclasses.replace(SPEC, state_size=2)
    found = observation_arrays(spec, ARM, histories)
    np.testing.assert_array_equal(found["images"], np.stack([images, 255 - images], axis=2), strict=True)
    np.testing.assert_array_equal(found["state"], np.float32([[[1, 0], [2, 0]]] * 2), strict=True)
    assert found["has_state"].tolist() == [1, 1] and found["has_camera"].tolist() == [[1, 1]] * 2
    without = observation_arrays(spec, HAND, histories)
    assert not without["state"].any() and without["has_state"].tolist() == [0, 0]
    assert "state" not in observation_arrays(dataclasses.replace(SPEC, state_size=0), HAND, histories)
    with pytest.raises(ValueError, match="states are"):
        observation_arrays(dataclasses.replace(spec, instants=3), ARM, histories)


def test_environments_are_kept_where_they_are_known(tmp_path: Path) -> None:
    known = dataclasses.replace(SPEC, environments={"robot": {"family": "libero", "look": "fast"}})
    save(known, tmp_path)
    assert PolicySpec.load(tmp_path).environments == known.environments
    save(SPEC, tmp_path)
    assert PolicySpec.load(tmp_path).environments == {}
