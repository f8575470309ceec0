"""Who reads whom, rule by rule, on a sequence small enough to write down."""

import itertools

import jax
import numpy as np
import pytest

from como_jax.policies.autoregressive import attention_mask
from como_jax.spec import autoregressive_mask as rules
from como_jax.spec.autoregressive_mask import Kind, make_layout

# Two instants with two observation tokens, a start token and two latents, and two action queries each.
LAYOUT = make_layout(2, language=2, observations=2, latents=3, actions=2)
NAMES = [
    f"{'toza'[kind]}{'' if instant < 0 else instant}{'abc'[slot]}"
    for kind, instant, slot in zip(LAYOUT.kind, LAYOUT.instant, LAYOUT.slot, strict=True)
]
LANGUAGE = {"ta", "tb"}
READS_ALWAYS = {
    "ta": LANGUAGE,
    "o0b": LANGUAGE | {"o0a", "o0b"},
    "o1a": LANGUAGE | {"o0a", "o0b", "o1a", "o1b"},
    "z0a": LANGUAGE | {"o0a", "o0b", "z0a"},
    "z0c": LANGUAGE | {"o0a", "o0b", "z0a", "z0b", "z0c"},
    "z1b": LANGUAGE | {"o0a", "o0b", "o1a", "o1b", "z0a", "z0b", "z0c", "z1a", "z1b"},
    "a0a": LANGUAGE | {"o0a", "o0b", "a0a", "a0b"},
    "a1b": LANGUAGE | {"o0a", "o0b", "o1a", "o1b", "a1a", "a1b"},
}
READS_LATENTS = {"a0a": {"z0a", "z0b", "z0c"}, "a1b": {"z0a", "z0b", "z0c", "z1a", "z1b", "z1c"}}


def read_by(mask: np.ndarray, name: str) -> set[str]:
    return {other for other, allowed in zip(NAMES, mask[NAMES.index(name)], strict=True) if allowed}


def pairs(mask: np.ndarray) -> set[tuple[Kind, Kind]]:
    """Kinds of reader and read."""
    return {(Kind(LAYOUT.kind[i]), Kind(LAYOUT.kind[j])) for i, j in np.argwhere(mask)}


@pytest.fixture(scope="module")
def make_mask() -> jax.stages.Wrapped:
    return jax.jit(lambda present, use_latents: attention_mask(LAYOUT, present, use_latents))


def test_tokens_lie_kind_by_kind_and_instant_by_instant() -> None:
    expected = "ta tb o0a o0b o1a o1b z0a z0b z0c z1a z1b z1c a0a a0b a1a a1b"
    assert expected.split() == NAMES


@pytest.mark.parametrize("use_latents", [True, False])
@pytest.mark.parametrize("name", READS_ALWAYS)
def test_a_token_reads_what_the_rules_together_allow(
    make_mask: jax.stages.Wrapped, name: str, use_latents: bool
) -> None:
    mask = np.asarray(make_mask(np.ones((1, len(NAMES)), bool), np.array([use_latents])))
    expected = READS_ALWAYS[name] | (READS_LATENTS.get(name, set()) if use_latents else set())
    assert read_by(mask[0], name) == expected


def test_language_is_read_by_all_and_reads_itself_alone() -> None:
    mask = rules.language_is_read_by_all(LAYOUT)
    assert pairs(mask) == {(kind, Kind.LANGUAGE) for kind in Kind}
    assert mask.sum() == 2 * len(NAMES)


def test_observations_are_read_by_their_instant_and_later_ones() -> None:
    mask = rules.observations_are_read_from_their_instant_on(LAYOUT)
    assert pairs(mask) == {(kind, Kind.OBSERVATION) for kind in Kind if kind != Kind.LANGUAGE}
    for i, j in itertools.product(range(len(NAMES)), np.flatnonzero(LAYOUT.kind == Kind.OBSERVATION)):
        assert mask[i, j] == (LAYOUT.instant[i] >= LAYOUT.instant[j]), (NAMES[i], NAMES[j])


def test_latents_are_causal_within_and_across_instants() -> None:
    mask = rules.latents_read_the_latents_before_them(LAYOUT)
    assert pairs(mask) == {(Kind.LATENT, Kind.LATENT)}
    latents = np.flatnonzero(LAYOUT.kind == Kind.LATENT)
    np.testing.assert_array_equal(mask[np.ix_(latents, latents)], np.tri(6, dtype=bool))


def test_action_queries_read_each_other_within_an_instant_and_nothing_else_reads_them() -> None:
    mask = rules.actions_read_each_other(LAYOUT)
    assert pairs(mask) == {(Kind.ACTION, Kind.ACTION)}
    actions = np.flatnonzero(LAYOUT.kind == Kind.ACTION)
    np.testing.assert_array_equal(mask[np.ix_(actions, actions)], np.kron(np.eye(2), np.ones((2, 2))))


def test_action_queries_read_latents_up_to_their_instant() -> None:
    mask = rules.actions_read_latents(LAYOUT)
    assert pairs(mask) == {(Kind.ACTION, Kind.LATENT)}
    assert read_by(mask, "a0b") == {"z0a", "z0b", "z0c"}
    assert len(read_by(mask, "a1a")) == 6


def test_a_token_that_is_not_there_is_read_by_itself_alone(make_mask: jax.stages.Wrapped) -> None:
    present = np.ones((2, len(NAMES)), bool)
    missing = [NAMES.index(name) for name in ("tb", "o0a", "z1a")]
    present[1, missing] = False
    mask = np.asarray(make_mask(present, np.ones(2, bool)))
    np.testing.assert_array_equal(mask[1][:, missing], np.eye(len(NAMES), dtype=bool)[:, missing])
    others = np.setdiff1d(np.arange(len(NAMES)), missing)
    np.testing.assert_array_equal(mask[1][:, others], mask[0][:, others])


def test_dropping_concerns_its_sample_and_the_latents_of_action_queries(make_mask: jax.stages.Wrapped) -> None:
    mask = np.asarray(make_mask(np.ones((2, len(NAMES)), bool), np.array([True, False])))
    np.testing.assert_array_equal(mask[0] & ~mask[1], rules.actions_read_latents(LAYOUT))
    assert not np.any(mask[1] & ~mask[0])


def test_a_layout_without_latents_has_none() -> None:
    layout = make_layout(2, language=3, observations=4, latents=0, actions=2)
    assert len(layout.kind) == 3 + 2 * (4 + 2)
    assert Kind.LATENT not in layout.kind
