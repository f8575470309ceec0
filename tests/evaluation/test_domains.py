"""Cosines of the same and of different actions, within and between domains."""

import types

import numpy as np
import pytest

from como_jax.errors import DatasetError
from como_jax.evaluation.latents.domains import segment_means, transfer_figure, transfer_matrix

SIZE, STEPS, LENGTH = 12, 4, 18
TASKS = ("push", "lift", "turn", "close")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _domain(rng, directions, tasks=TASKS, episodes=6, offset=3.0, strength=1.0):
    """A labelled dataset: `episodes` of each task, whose latents are the task's direction, an offset and noise."""
    instruction = [task for task in tasks for _ in range(episodes)]
    means = np.repeat([directions[task] for task in tasks], episodes, axis=0)[:, None]
    noise = rng.normal(size=(len(means), LENGTH, SIZE)) + 0.5 * rng.normal(size=(len(means), 1, SIZE))
    latent = strength * means + offset * rng.normal(size=SIZE) + noise
    return types.SimpleNamespace(
        directory="somewhere",
        latent_motion=latent.reshape(-1, SIZE).astype(np.float32),
        latent_valid=np.tile(np.arange(LENGTH) < LENGTH - 1, len(means)),
        start=np.arange(len(means)) * LENGTH,
        length=np.full(len(means), LENGTH),
        instruction=instruction,
    )


def _directions(rng, tasks=TASKS):
    return dict(zip(tasks, 2.0 * rng.normal(size=(len(tasks), SIZE)), strict=True))


def test_segments_are_means_of_disjoint_valid_steps():
    latent = np.arange(10.0)[:, None]
    valid = np.array([0, 1, 1, 1, 1, 1, 0, 1, 1, 0], bool)
    np.testing.assert_array_equal(segment_means(latent, valid, 2)[:, 0], [1.5, 3.5, 7.5])
    assert segment_means(latent, valid, 6).shape == (0, 1)
    np.testing.assert_array_equal(segment_means(latent, np.ones(10, bool), 5)[:, 0], [2.0, 7.0])


@pytest.mark.parametrize("centered", [True, False])
def test_matrix_is_that_of_all_pairs_of_segments(rng, centered):
    directions = _directions(rng)
    sources = {"a": _domain(rng, directions), "b": _domain(rng, directions, TASKS[1:])}
    matrix = transfer_matrix(sources, steps=STEPS, centered=centered, permutations=1)
    units = {}
    for name, source in sources.items():
        latent = source.latent_motion.astype(np.float64).reshape(-1, LENGTH, SIZE)
        segments = latent[:, :16].reshape(len(latent), 4, STEPS, SIZE).mean(2)
        segments -= segments.mean((0, 1)) * centered
        units[name] = segments / np.linalg.norm(segments, axis=-1, keepdims=True)
    for row, first in enumerate(sources):
        for column, second in enumerate(sources):
            cosines = np.einsum("esd,ftd->ef", units[first], units[second]) / 16
            pairs = {}
            for e, task in enumerate(sources[first].instruction):
                for f, other in enumerate(sources[second].instruction):
                    if first != second or e != f:
                        pairs.setdefault((task, other), []).append(cosines[e, f])
            same = np.mean([np.mean(values) for (a, b), values in pairs.items() if a == b])
            other = np.mean([np.mean(values) for (a, b), values in pairs.items() if a != b])
            assert matrix.same[row, column] == pytest.approx(same)
            assert matrix.other[row, column] == pytest.approx(other)
    np.testing.assert_array_equal(matrix.common, [[4, 3], [3, 3]])
    np.testing.assert_allclose(matrix.gap, matrix.same - matrix.other)


def test_domains_that_share_the_directions_of_actions_transfer(rng):
    directions = _directions(rng)
    sources = {name: _domain(rng, directions) for name in ("robot", "hand", "sim")}
    matrix = transfer_matrix(sources, steps=STEPS, permutations=199)
    assert matrix.names == ("robot", "hand", "sim") and not matrix.notes
    assert (matrix.gap > 0.5).all() and (matrix.p_value == 1 / 200).all()
    np.testing.assert_array_equal(matrix.same, matrix.same.T)


def test_domains_with_directions_of_their_own_do_not_transfer(rng):
    p_values = []
    for _ in range(20):
        sources = {name: _domain(rng, _directions(rng), TASKS, episodes=3) for name in ("robot", "hand")}
        matrix = transfer_matrix(sources, steps=STEPS, permutations=99)
        assert matrix.gap[0, 0] > 0.3 and matrix.p_value[0, 0] < 0.05
        p_values.append(matrix.p_value[0, 1])
    assert 0.2 < np.mean(p_values) < 0.8


def test_p_values_of_latents_without_any_action_are_uniform(rng):
    nothing = {task: np.zeros(SIZE) for task in TASKS}
    p_values = []
    for _ in range(40):
        sources = {name: _domain(rng, nothing, episodes=3) for name in ("robot", "hand")}
        matrix = transfer_matrix(sources, steps=STEPS, permutations=39)
        p_values.append([matrix.p_value[0, 0], matrix.p_value[0, 1]])
    assert (np.abs(np.mean(p_values, 0) - 0.5) < 0.15).all()
    assert np.mean(np.array(p_values) <= 0.05) < 0.15


def test_centring_removes_what_a_domain_has_in_all_its_latents(rng):
    directions = _directions(rng)
    sources = {name: _domain(rng, directions, offset=20.0) for name in ("robot", "hand")}
    raw, centred = (transfer_matrix(sources, steps=STEPS, centered=c, permutations=9) for c in (False, True))
    assert raw.same[0, 0] > 0.95 and raw.gap[0, 1] < 0.1 and centred.gap[0, 1] > 0.5


def test_instructions_are_matched_after_normalising_and_by_classes(rng):
    directions = _directions(rng)
    first, second = (_domain(rng, directions) for _ in range(2))
    second.instruction = [f"  {text.upper()} " for text in second.instruction]
    assert transfer_matrix({"a": first, "b": second}, steps=STEPS, permutations=9).common[0, 1] == 4
    second.instruction = [f"please {text.strip()}" for text in second.instruction]
    apart = transfer_matrix({"a": first, "b": second}, steps=STEPS, permutations=9)
    assert np.isnan(apart.same[0, 1]) and np.isnan(apart.p_value[1, 0])
    assert apart.notes == ("a and b: not compared, since they have no instruction in common.",)
    classes = {f"Please  {task}": task for task in TASKS} | {"fly": "push"}
    matrix = transfer_matrix({"a": first, "b": second}, steps=STEPS, action_classes=classes, permutations=9)
    assert matrix.common[0, 1] == 4 and matrix.gap[0, 1] > 0.5
    assert matrix.notes == ("no episode has the instruction 'fly' of action_classes.",)


def test_what_is_left_out_is_said(rng):
    directions = _directions(rng)
    full, single, once = _domain(rng, directions), _domain(rng, directions, TASKS[:1]), _domain(rng, directions)
    full.instruction[:2] = ["", "  "]
    full.latent_valid[5 * LENGTH : 6 * LENGTH] = False
    once = _domain(rng, directions, episodes=1)
    matrix = transfer_matrix({"full": full, "single": single, "once": once}, steps=STEPS, permutations=9)
    assert {
        "full: 2 episodes without an instruction are left out.",
        "full: 1 episodes without 4 consecutive valid latents are left out.",
        "full and single: not compared, since a domain of fewer than two actions is all mean.",
        "once with itself: not compared, since they have no two episodes of the same action to compare.",
    } <= set(matrix.notes)
    np.testing.assert_array_equal(
        np.isnan(matrix.same), [[False, True, False], [True, True, True], [False, True, True]]
    )


def test_datasets_that_cannot_be_compared_are_refused(rng):
    source = _domain(rng, _directions(rng))
    narrow = types.SimpleNamespace(**{**vars(source), "latent_motion": source.latent_motion[:, :3]})
    with pytest.raises(DatasetError, match="latents have different sizes.*same model"):
        transfer_matrix({"a": source, "b": narrow})
    source.latent_motion = None
    with pytest.raises(DatasetError, match="robot .* has no latents"):
        transfer_matrix({"robot": source})
    with pytest.raises(DatasetError, match="at least one dataset"):
        transfer_matrix({})


def test_figure_has_a_number_in_every_cell_of_both_maps(rng):
    sources = {"a": _domain(rng, _directions(rng)), "b": _domain(rng, _directions(rng, ("x", "y")), ("x", "y"))}
    matrix = transfer_matrix(sources, steps=STEPS, permutations=9)
    figure = transfer_figure(matrix)
    same, gap = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert same == [f"{matrix.same[0, 0]:.2f}", "none", "none", f"{matrix.same[1, 1]:.2f}"]
    assert gap[0] == f"{matrix.gap[0, 0]:+.2f}\np {matrix.p_value[0, 0]:.3f}" and gap[1] == "none"
    figure.canvas.draw()
