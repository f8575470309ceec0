"""What a policy's run says about how to act, written and read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from como_jax.errors import ConfigError, RunError
from como_jax.policies.spec import FILE_NAME, PolicySpec, Scales
from como_jax.spec.normalization import AffineNormalizer, UniformNormalizer

ARM = Scales(
    AffineNormalizer.fit("mean_std", {"mean": [1, 2], "std": [3, 0]}),
    AffineNormalizer.fit("mean_std", {"mean": [1], "std": [2]}),
)
HAND = Scales(AffineNormalizer.fit("none", {"mean": [0, 0, 0]}), None)
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
    scales={"arm": ARM, "hand": HAND},
)


def read_json(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / FILE_NAME).read_text())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    SPEC.save(tmp_path)
    found = PolicySpec.load(tmp_path)
    assert dataclasses.replace(found, scales=SPEC.scales) == SPEC and list(found.scales) == ["arm", "hand"]
    values = np.random.default_rng(0).normal(size=(5, 2))
    np.testing.assert_array_equal(found.scales["arm"].action(values), ARM.action(values))
    np.testing.assert_array_equal(found.scales["arm"].action.inverse(values), ARM.action.inverse(values))
    np.testing.assert_array_equal(found.scales["arm"].state(values[:, :1]), ARM.state(values[:, :1]))
    assert found.scales["hand"].state is None
    written = read_json(tmp_path)
    found.save(tmp_path)
    assert read_json(tmp_path) == written


def test_quantiles_are_read_as_they_were_written(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    scale = UniformNormalizer.fit(values)
    dataclasses.replace(SPEC, scales={"arm": Scales(scale, None)}).save(tmp_path)
    found = PolicySpec.load(tmp_path).scales_of().action
    np.testing.assert_array_equal(found(values), scale(values))
    np.testing.assert_array_equal(found.inverse(values), scale.inverse(values))


def test_a_policy_without_robots_has_no_scales(tmp_path: Path) -> None:
    dataclasses.replace(SPEC, scales={}, action_size=0).save(tmp_path)
    assert PolicySpec.load(tmp_path).scales == {}


def test_a_directory_without_policy_is_no_policy(tmp_path: Path) -> None:
    for workdir in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=f"{workdir} holds no policy: it has no policy.json"):
            PolicySpec.load(workdir)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file holds no policy"):
        PolicySpec.load(tmp_path / "file")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"cameras": [], "scales": []}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(text)
    with pytest.raises(RunError, match=f"{tmp_path}/policy.json is damaged or of another version"):
        PolicySpec.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"cameras": 3},
        {"scales": []},
        {"scales": {"arm": {}}},
        {"scales": {"arm": None}},
        {"scales": {"arm": {"action": None, "state": None}}},
        {"scales": {"arm": {"action": {"offset": [0], "scale": [1, 2], "varies": [True]}, "state": None}}},
        {"scales": {"arm": {"action": {"offset": ["x"], "scale": [1], "varies": [True]}, "state": None}}},
        {"scales": {"arm": {"action": {"edges": [[1, 0]]}, "state": None}}},
        {"number_of_arms": 2},
    ],
)
def test_a_file_of_other_fields_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    SPEC.save(tmp_path)
    (tmp_path / FILE_NAME).write_text(json.dumps({**read_json(tmp_path), **changes}))
    with pytest.raises(RunError, match="policy.json is damaged or of another version"):
        PolicySpec.load(tmp_path)


def test_a_field_that_lacks_is_named(tmp_path: Path) -> None:
    SPEC.save(tmp_path)
    for name in read_json(tmp_path):
        (tmp_path / "other").mkdir(exist_ok=True)
        values = {key: value for key, value in read_json(tmp_path).items() if key != name}
        (tmp_path / "other" / FILE_NAME).write_text(json.dumps(values))
        with pytest.raises(RunError, match=f"policy.json is damaged .*'{name}'"):
            PolicySpec.load(tmp_path / "other")


def test_scales_are_chosen_by_the_name_of_their_dataset() -> None:
    assert SPEC.scales_of("hand") is HAND
    assert dataclasses.replace(SPEC, scales={"arm": ARM}).scales_of() is ARM
    with pytest.raises(ConfigError, match="several robots; choose one by --dataset: arm, hand"):
        SPEC.scales_of()
    with pytest.raises(ConfigError, match="--dataset han: the policy was trained on arm, hand; did you mean hand?"):
        SPEC.scales_of("han")
