"""Which parts of a source become cameras, actions, states and language of the dataset."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Selection:
    """The keys of a source that a conversion reads.

    Attributes:
      cameras: key by the name that the camera gets in the dataset; the first is the main camera.
      actions: keys, joined in this order; empty for none.
      states: keys, joined in this order; empty for none.
      language: key of the instruction, or None; several keys, of texts that mean the same, are separated by commas.
    """

    cameras: Mapping[str, str]
    actions: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    language: str | None = None

    @property
    def language_keys(self) -> tuple[str, ...]:
        """The keys of all instructions."""
        return tuple(key.strip() for key in (self.language or "").split(",") if key.strip())


def missing_warnings(**keys: object) -> list[str]:
    """Warnings for the report about what was not converted; `action=()` gives "no action was converted"."""
    return [f"no {kind} was converted" for kind, chosen in keys.items() if not chosen]


def as_identifier(key: str) -> str:
    """Replaces everything but ASCII letters, digits and underscores, which names of cameras consist of."""
    return re.sub(r"\W", "_", key, flags=re.ASCII)


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggests names that could have been meant, as the end of an error message."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are {', '.join(known)}" if known else ""
