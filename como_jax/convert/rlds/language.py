"""Instructions of RLDS episodes: where they may be, and how they are read from the values of a record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

LANGUAGE_KEYS = (
    "language_instruction",
    "observation/natural_language_instruction",
    "observation/language_instruction",
    "natural_language_instruction",
    "instruction",
)
CHANGES = "the language changes within an episode: that of its first step counts"
BAD_BYTES = "a language instruction is not UTF-8; its bad bytes were replaced by \ufffd"
# The last part of the key of an instruction in what a record holds beside its steps, with or without a number.
_EPISODE_NAME = re.compile(
    r"((natural_)?language(_instructions?)?|instructions?|task(_description|_name)?|captions?|prompt|text)(_\d+)?"
)
_NUMBERED = re.compile(r"_\d+")


def leaves(features: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields key path and feature of everything in a features dict."""
    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from leaves(feature, f"{prefix}{name}/")
        else:
            yield prefix + name, feature


def is_text(feature: Any) -> bool:
    """Whether a feature is a text, several texts, or the padded code points of a text, as in Language-Table."""
    if isinstance(feature, tfds.features.Dataset | tfds.features.FeaturesDict) or len(feature.shape) > 1:
        return False
    is_code_points = len(feature.shape) == 1 and np.issubdtype(feature.np_dtype, np.integer)
    return is_code_points or feature.np_dtype == np.object_


def text_keys(features: Mapping[str, Any]) -> list[str]:
    """Returns the keys of everything that holds texts, which may be instructions."""
    return [key for key, feature in features.items() if is_text(feature) and feature.np_dtype == np.object_]


def with_numbered(first: str, steps: Mapping[str, Any]) -> str:
    """Returns a key and those that differ from it by a number, separated by commas.

    DROID, for example, has three texts for an episode: `language_instruction`, `language_instruction_2` and `_3`.
    """
    others = [key for key in text_keys(steps) if key.startswith(first) and _NUMBERED.fullmatch(key[len(first) :])]
    return ",".join([first, *others])


def usual_language(steps: Mapping[str, Any], episode: Mapping[str, Any]) -> str:
    """Returns the usual keys of instructions, separated by commas: of the steps or, without any, of the episode."""
    first = next((key for key in LANGUAGE_KEYS if key in steps), None)
    if first is not None:
        return with_numbered(first, steps)
    named = [key for key in text_keys(episode) if _EPISODE_NAME.fullmatch(key.rpartition("/")[2].lower())]
    return ",".join(named)


def read_texts(keys: Iterable[str], episode: Mapping[str, Any], steps: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Returns the instructions of an episode, and what is unusual about them.

    Args:
      keys: of the instructions.
      episode: values of the episode by key.
      steps: values of every step, in which a key such as `observation/text` is a path.
    """
    texts: list[str] = []
    notes: list[str] = []
    for key in keys:
        stored = [episode[key]] if key in episode else [lookup(step, key) for step in steps]
        found = [each for each in map(_texts, stored) if each]
        texts += found[0] if found else []
        if any(each != found[0] for each in found):
            notes.append(CHANGES)
    if any("\ufffd" in text for text in texts):
        notes.append(BAD_BYTES)
    return list(dict.fromkeys(texts)), list(dict.fromkeys(notes))


def lookup(step: Mapping[str, Any], key: str) -> Any:
    """Returns the value at a key path."""
    value: Any = step
    for part in key.split("/"):
        value = value[part]
    return value


def _texts(value: Any) -> list[str]:
    """Returns the texts of a value that are not empty: one text, several, or code points padded with zeros."""
    if isinstance(value, np.ndarray) and value.ndim and value.dtype.kind in "iu":
        texts = ["".join(chr(point) if 0 < point < 0x110000 else "\ufffd" for point in _without_padding(value))]
    elif isinstance(value, np.ndarray | list | tuple) and np.ndim(value):
        texts = [_decoded(each) for each in value]
    else:
        texts = [_decoded(value)]
    return [text.strip() for text in texts if text.strip()]


def _decoded(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _without_padding(values: np.ndarray) -> list[int]:
    zeros = np.flatnonzero(values == 0)
    return values[: zeros[0]].tolist() if zeros.size else values.tolist()
