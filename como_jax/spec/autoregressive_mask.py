"""Which token reads which in the autoregressive policy: one function for every rule.

Every rule gives the pairs that it allows, bool `[N, N]`, where row i reads column j; the mask is their union. Language
reads only language. The tokens of an instant read language, the observations up to their instant, and:

- observations read nothing else, so that no latent can reach an action query through them;
- latent tokens read the latents before them, of their own instant and of all earlier ones, as in Moto (arXiv
  2412.04445);
- action queries read each other within their instant, and the latents up to it, which are hidden from some samples in
  training.

Axes: N tokens.
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np


class Kind(enum.IntEnum):
    """What a token is."""

    LANGUAGE = 0
    OBSERVATION = 1
    LATENT = 2
    ACTION = 3


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tokens of a sequence, each an int array `[N]`.

    Attributes:
      kind: a `Kind`.
      instant: position in the history; -1 for language.
      slot: index of the token among those of its kind and instant.
    """

    kind: np.ndarray
    instant: np.ndarray
    slot: np.ndarray


def make_layout(instants: int, *, language: int, observations: int, latents: int, actions: int) -> Layout:
    """First all language tokens, then all observations, all latents and all action queries, each in order of instants.

    Args:
      instants: of the history.
      language: number of tokens of the instruction.
      observations: number of tokens of the observation at one instant.
      latents: number of latent tokens of one instant.
      actions: number of action queries of one instant.
    """
    parts = [(Kind.LANGUAGE, -1, language)]
    for kind, count in ((Kind.OBSERVATION, observations), (Kind.LATENT, latents), (Kind.ACTION, actions)):
        parts += [(kind, instant, count) for instant in range(instants)]
    return Layout(
        kind=np.concatenate([np.full(count, kind) for kind, _, count in parts]),
        instant=np.concatenate([np.full(count, instant) for _, instant, count in parts]),
        slot=np.concatenate([np.arange(count) for _, _, count in parts]),
    )


def language_is_read_by_all(layout: Layout) -> np.ndarray:
    """Every token reads the instruction."""
    return np.broadcast_to(layout.kind == Kind.LANGUAGE, (len(layout.kind),) * 2)


def observations_are_read_from_their_instant_on(layout: Layout) -> np.ndarray:
    """The tokens of an instant, also its observations, read the observations of this instant and of earlier ones."""
    return (layout.kind == Kind.OBSERVATION) & (layout.instant[:, None] >= layout.instant)


def latents_read_the_latents_before_them(layout: Layout) -> np.ndarray:
    """Latent tokens read those of earlier instants, and those of their own instant up to themselves."""
    earlier = layout.instant[:, None] > layout.instant
    before = (layout.instant[:, None] == layout.instant) & (layout.slot[:, None] >= layout.slot)
    return _pairs(layout, Kind.LATENT, Kind.LATENT) & (earlier | before)


def actions_read_each_other(layout: Layout) -> np.ndarray:
    """The action queries of one instant read each other; no other token reads them."""
    return _pairs(layout, Kind.ACTION, Kind.ACTION) & (layout.instant[:, None] == layout.instant)


def actions_read_latents(layout: Layout) -> np.ndarray:
    """Action queries read the latents of their instant and of earlier ones."""
    return _pairs(layout, Kind.ACTION, Kind.LATENT) & (layout.instant[:, None] >= layout.instant)


def always_allowed(layout: Layout) -> np.ndarray:
    """All pairs but those of action queries that read latents."""
    return (
        language_is_read_by_all(layout)
        | observations_are_read_from_their_instant_on(layout)
        | latents_read_the_latents_before_them(layout)
        | actions_read_each_other(layout)
    )


def _pairs(layout: Layout, reader: Kind, read: Kind) -> np.ndarray:
    """All pairs of a token of kind `reader` with a token of kind `read`, bool `[N, N]`."""
    return (layout.kind == reader)[:, None] & (layout.kind == read)
