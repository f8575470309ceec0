"""Scenes that look otherwise."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from como_jax.envs.libero.variation import VARIATIONS, Variation, pattern

BODIES = ("table", "gripper0_finger", "robot0_link1", "bowl")


def make_model() -> SimpleNamespace:
    """A table with a material, a hand, an arm with a material, and a bowl with a shape for collisions."""
    return SimpleNamespace(
        body=lambda number: SimpleNamespace(name=BODIES[number]),
        camera=lambda number: SimpleNamespace(name=("agentview", "robot0_eye_in_hand")[number]),
        tex=lambda number: SimpleNamespace(name=("tex-floor", "tex-bowl")[number]),
        ncam=2,
        ntex=2,
        geom_bodyid=np.array([0, 1, 2, 3, 3]),
        geom_group=np.array([1, 1, 1, 1, 0]),
        geom_matid=np.array([0, -1, 1, -1, -1]),
        geom_rgba=np.full((5, 4), 0.5),
        mat_rgba=np.ones((2, 4)),
        light_diffuse=np.full((1, 3), 0.6),
        light_ambient=np.zeros((1, 3)),
        tex_data=np.full(2 * 4 * 6 * 3, 7, np.uint8),
        tex_adr=np.array([0, 72]),
        tex_height=np.array([4, 4]),
        tex_width=np.array([6, 6]),
        tex_nchannel=np.array([3, 3]),
    )


def make_data() -> SimpleNamespace:
    return SimpleNamespace(
        cam_xpos=np.array([[1.0, 0, 2], [0, 0, 1]]), cam_xmat=np.tile(np.eye(3).ravel(), (2, 1)),
        light_xdir=np.array([[0.0, 0, -1]]),
    )  # fmt: skip


@pytest.mark.parametrize("name", VARIATIONS)
def test_each_variation_changes_its_part_alone_and_by_the_seed(name: str) -> None:
    def changed(seed: int) -> tuple[set[str], dict[str, np.ndarray]]:
        model, data, before = make_model(), make_data(), vars(make_model()) | vars(make_data())
        variation = Variation(model, (name,))
        textures = variation.draw(seed + 1)
        assert textures == variation.draw(seed) == ([0] if name == "textures" else [])
        variation.place(data, 0.5)
        after = {key: value for key, value in (vars(model) | vars(data)).items() if isinstance(value, np.ndarray)}
        return {key for key, value in after.items() if (value != before[key]).any()}, after

    names, after = changed(3)
    assert (
        names
        == {
            "camera": {"cam_xpos", "cam_xmat"},
            "motion": {"cam_xpos", "cam_xmat"},
            "colours": {"geom_rgba", "mat_rgba"},
            "textures": {"tex_data"},
            "light": {"light_diffuse", "light_ambient", "light_xdir"},
            "arm": {"geom_rgba", "geom_matid"},
            "hand": {"geom_rgba", "geom_group"},
        }[name]
    )
    for same, other, key in ((changed(3)[1], changed(4)[1], key) for key in names - {"geom_group", "geom_matid"}):
        np.testing.assert_array_equal(same[key], after[key])
        assert (other[key] != after[key]).any()
    # Neither the camera of the hand nor what is not the robot's.
    np.testing.assert_array_equal(after["cam_xpos"][1], [0, 0, 1])
    if name == "colours":
        np.testing.assert_array_equal(after["geom_rgba"][:3], 0.5)
        np.testing.assert_array_equal(after["mat_rgba"][1], 1)
    if name in ("arm", "hand"):
        np.testing.assert_array_equal(after["geom_rgba"][[0, 3, 4]], 0.5)
    if name == "hand":
        np.testing.assert_array_equal(after["geom_group"], [1, 1, 5, 1, 0])
    if name == "textures":
        np.testing.assert_array_equal(after["tex_data"][72:], 7)


def test_a_moving_camera_goes_on_looking_at_its_place() -> None:
    variation = Variation(make_model(), ("motion",))
    variation.draw(0)
    places = []
    for step in range(20):
        data = make_data()
        variation.place(data, step / 20)
        matrix = data.cam_xmat[0].reshape(3, 3)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(data.cam_xpos[0] - 0.9 * matrix[:, 2], [1, 0, 1.1], atol=1e-12)
        places.append(data.cam_xpos[0])
    steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    assert 0 < steps.max() < 0.05


def test_patterns_have_two_colours_or_shades_between_them() -> None:
    drawn = [pattern(np.random.default_rng(seed), 32, 48) for seed in range(12)]
    assert {image.shape for image in drawn} == {(32, 48, 3)} and min(image.std() for image in drawn) > 1
    assert {len(np.unique(image.reshape(-1, 3), axis=0)) > 2 for image in drawn} == {True, False}
