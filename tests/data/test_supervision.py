"""True motion of a few episodes: which, in what units, and in which columns of the target."""

import types
from typing import Any

import numpy as np
import pytest

from como_jax.data.supervision import Supervision
from como_jax.errors import ConfigError, DatasetError

LENGTHS, GAP = np.array([6, 9, 2, 12]), 3


def make_source(action: int | None = 2, state: int | None = 3, name: str = "a") -> Any:
    rng = np.random.default_rng(0)
    steps = LENGTHS.sum()
    return types.SimpleNamespace(
        directory=name,
        start=np.concatenate([[0], np.cumsum(LENGTHS)[:-1]]),
        length=LENGTHS,
        episode_id=[f"{name}{row}" for row in range(len(LENGTHS))],
        action=None if action is None else rng.normal(3.0, 10.0, (steps, action)).astype(np.float32),
        state=None if state is None else rng.normal(0.0, 0.01, (steps, state)).astype(np.float32),
    )


def make_supervision(
    *sources: Any, kinds: tuple[str, ...] = ("action",), fraction: float = 1.0, scales: Any = types.MappingProxyType({})
) -> Supervision:
    index = types.SimpleNamespace(gap=np.full(len(LENGTHS), GAP))
    parts: Any = [types.SimpleNamespace(source=source, index=index) for source in sources]
    return Supervision(parts, kinds, fraction, scales)


def starts(source: Any, episode: int) -> np.ndarray:
    return source.start[episode] + np.arange(source.length[episode] - GAP)


def test_labels_are_standardised_mean_actions_and_changes_of_state() -> None:
    source = make_source()
    labels = make_supervision(source, kinds=("action", "state"))
    found = [labels(0, episode, starts(source, episode), GAP) for episode in (0, 1, 3)]
    raw = [
        np.concatenate([source.action[t : t + GAP].mean(0), source.state[t + GAP] - source.state[t]])
        for episode in (0, 1, 3)
        for t in starts(source, episode)
    ]
    expected = (raw - np.mean(raw, axis=0)) / np.std(raw, axis=0)
    np.testing.assert_allclose(np.concatenate([target for target, _ in found]), expected, rtol=1e-3, atol=1e-4)
    assert all(np.all(known == 1.0) for _, known in found) and labels.size == 5


def test_scales_of_the_first_start_stay() -> None:
    source, other = make_source(), make_source(name="b")
    scales = make_supervision(source, other).scales()
    assert list(scales) == ["a", "b"] and scales["a"]["true_motion"].size == 2
    changed = make_source()
    changed.action = 100 * changed.action
    found, fresh = (make_supervision(changed, other, scales=given) for given in (scales, {}))
    first = starts(source, 1)
    expected = scales["a"]["true_motion"](np.stack([changed.action[t : t + GAP].mean(0) for t in first]))
    np.testing.assert_allclose(found(0, 1, first, GAP)[0][:, :2], expected, rtol=1e-4)
    assert np.abs(fresh(0, 1, first, GAP)[0] - found(0, 1, first, GAP)[0]).max() > 10
    assert found.scales()["a"]["true_motion"].to_json() == scales["a"]["true_motion"].to_json()
    with pytest.raises(DatasetError, match="a has 4 numbers of true motion, and the run was started with 2"):
        make_supervision(make_source(action=4), scales=scales)


def test_datasets_of_one_name_have_scales_of_their_own() -> None:
    sources = [make_source(name=name) for name in ("x/1.0.0", "y/1.0.0", "z/arm")]
    assert list(make_supervision(*sources).scales()) == ["x/1.0.0", "y/1.0.0", "arm"]


def test_a_fraction_of_the_episodes_is_labelled_whatever_their_order() -> None:
    source = make_source()
    chosen = [make_supervision(source, fraction=0.34)._parts[0].episodes for _ in range(2)]
    np.testing.assert_array_equal(*chosen)
    assert chosen[0].sum() == 1 and not chosen[0][2], "the third episode is too short for a pair"
    unlabelled = int(np.flatnonzero(~chosen[0])[0])
    assert not make_supervision(source, fraction=0.34)(0, unlabelled, starts(source, 1)[:1], GAP)[1].any()


def test_each_dataset_has_a_part_of_its_own() -> None:
    one, none, two = make_source(2), make_source(None, None, "b"), make_source(4, None, "c")
    labels = make_supervision(one, none, two)
    assert labels.size == 6
    assert labels(0, 0, starts(one, 0), GAP)[1][0].tolist() == [1, 1, 0, 0, 0, 0]
    assert labels(1, 0, starts(none, 0), GAP)[1][0].tolist() == [0, 0, 0, 0, 0, 0]
    assert labels(2, 0, starts(two, 0), GAP)[1][0].tolist() == [0, 0, 1, 1, 1, 1]


def test_a_constant_dimension_is_labelled_zero() -> None:
    source = make_source()
    source.action[:, 1] = 7.0
    found = make_supervision(source)(0, 0, starts(source, 0), GAP)[0]
    np.testing.assert_array_equal(found[:, 1], 0.0)


@pytest.mark.parametrize(
    ("kinds", "fraction", "error", "message"),
    [
        (("torque",), 0.5, ConfigError, "data.labels 'torque' must consist of action, state"),
        ((), 0.5, ConfigError, "data.labels '' must consist of"),
        (("action",), 0.0, ConfigError, "data.labelled_fraction must lie in"),
        (("action",), 0.5, DatasetError, "data.labels asks for action, which no dataset has: video"),
    ],
)
def test_what_cannot_be_labelled_is_refused(kinds: Any, fraction: float, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make_supervision(make_source(None, None, "video"), kinds=kinds, fraction=fraction)
