"""Choice of arrays in an .npz file: cameras, actions, states, language."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from como_jax.convert.npz.archive import ArrayHeader

_ACTION_KEYS = ("action", "actions")
_STATE_KEYS = ("state", "states")
_LANGUAGE_KEYS = ("language_instruction", "instruction", "language", "task")
_NUMBER_KINDS = "biuf"
_TEXT_KINDS = "US"


@dataclasses.dataclass(frozen=True)
class Selection:
    """Arrays that a conversion reads.

    Attributes:
      cameras: key by the name that it gets in the steps, the main camera first.
      actions: keys, joined in this order; empty for none.
      states: keys, joined in this order; empty for none.
      language: key of a text, or None.
    """

    cameras: Mapping[str, str]
    actions: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    language: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """All arrays with one entry a step."""
        return tuple(dict.fromkeys((*self.cameras.values(), *self.states, *self.actions)))


def select(
    headers: Mapping[str, ArrayHeader],
    cameras: Sequence[str],
    actions: Sequence[str] | None,
    states: Sequence[str] | None,
    language: str | None,
) -> Selection:
    """Chooses arrays by the keys that were asked for, or by what is usual.

    Args:
      headers: the arrays of a file.
      cameras: keys; empty for the only array that can be pictures.
      actions: keys; None for a usual one if it is there, empty for none.
      states: likewise.
      language: key; None for a usual one if it is there, '' for none.

    Raises:
      ValueError: something is not there, or not what it should be.
    """
    texts = [key for key in _LANGUAGE_KEYS if key in headers and headers[key].dtype.kind in _TEXT_KINDS]
    selection = Selection(
        _camera_names(cameras or _evident_camera(headers)),
        _first(headers, _ACTION_KEYS) if actions is None else tuple(actions),
        _first(headers, _STATE_KEYS) if states is None else tuple(states),
        next(iter(texts), None) if language is None else language or None,
    )
    check(headers, selection)
    return selection


def check(headers: Mapping[str, ArrayHeader], selection: Selection) -> tuple[int, ...]:
    """Checks the arrays of a file against a selection.

    Returns:
      `(T,)` for one trajectory of T steps with an action, or `(N, T)` for a batch of N.

    Raises:
      ValueError: an array is missing, of another type, or does not have as many steps as the others.
    """
    for key in selection.keys + (() if selection.language is None else (selection.language,)):
        if key not in headers:
            raise ValueError(f"there is no array {key!r}; there are: {describe(headers)}")
        if headers[key].dtype.hasobject:
            raise ValueError(f"array {key!r} holds Python objects, which are not read since they may run code")
    for key in selection.cameras.values():
        if not _is_camera(headers[key]):
            raise ValueError(f"array {key!r} is {headers[key]}, but pictures are uint8 [T, H, W, 3] or [N, T, H, W, 3]")
    for key in (*selection.states, *selection.actions):
        if headers[key].dtype.kind not in _NUMBER_KINDS:
            raise ValueError(f"array {key!r} is {headers[key]}, which are no numbers")
    if selection.language is not None and headers[selection.language].dtype.kind not in _TEXT_KINDS:
        raise ValueError(f"array {selection.language!r} is {headers[selection.language]}, which is no text")
    return _check_lengths(headers, selection)


def describe(headers: Mapping[str, ArrayHeader]) -> str:
    """Keys, types and shapes."""
    return ", ".join(f"{key} {header}" for key, header in headers.items()) or "none"


def _check_lengths(headers: Mapping[str, ArrayHeader], selection: Selection) -> tuple[int, ...]:
    """All arrays have as many steps as the main camera, except that the last step may go without an action."""
    main = next(iter(selection.cameras.values()))
    steps = headers[main].shape[:-3]
    without_last = (*steps[:-1], steps[-1] - 1)
    for key in (*selection.cameras.values(), *selection.states):
        if headers[key].shape[: len(steps)] != steps:
            raise ValueError(f"array {key!r} is {headers[key]}, but {main!r} is {headers[main]}")
    lengths = {key: headers[key].shape[: len(steps)] for key in selection.actions}
    for key, length in lengths.items():
        if length not in (steps, without_last):
            raise ValueError(f"array {key!r} is {headers[key]}, but {main!r} is {headers[main]}")
    return without_last if without_last in lengths.values() else steps


def _evident_camera(headers: Mapping[str, ArrayHeader]) -> list[str]:
    found = [key for key, header in headers.items() if _is_camera(header)]
    if len(found) != 1:
        what = "no array" if not found else "more than one array"
        raise ValueError(
            f"{what} is uint8 [T, H, W, 3] or [N, T, H, W, 3]; choose with --camera from: {describe(headers)}"
        )
    return found


def _camera_names(keys: Sequence[str]) -> dict[str, str]:
    names = {re.sub(r"\W", "_", key, flags=re.ASCII): key for key in keys}
    if len(names) < len(keys):
        raise ValueError(f"cameras {', '.join(keys)} do not have different names")
    return names


def _first(headers: Mapping[str, ArrayHeader], usual: Sequence[str]) -> tuple[str, ...]:
    return tuple(key for key in usual if key in headers)[:1]


def _is_camera(header: ArrayHeader) -> bool:
    return header.dtype == "uint8" and len(header.shape) in (4, 5) and header.shape[-1] == 3
