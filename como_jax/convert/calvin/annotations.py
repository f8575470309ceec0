"""CALVIN's language annotations: which windows of steps have which instruction."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from etils import epath

from como_jax.convert.calvin.pickled import read_pickled_object
from como_jax.errors import ConversionError

_PATHS = ("lang_annotations/auto_lang_ann.npy", "auto_lang_ann.npy")


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One annotated window of steps.

    Attributes:
      start: number of the first step.
      end: number of the last step, which belongs to the window.
      instruction: what is done in it.
    """

    start: int
    end: int
    instruction: str


def read_annotations(split: epath.Path) -> list[Annotation] | None:
    """The annotations of a split folder such as `training`, or None if it has no file of them.

    Raises:
      ConversionError: the file is damaged, or is no mere data.
    """
    path = next((split / name for name in _PATHS if (split / name).exists()), None)
    if path is None:
        return None
    content = read_pickled_object(path)
    try:
        texts, windows = list(content["language"]["ann"]), content["info"]["indx"]
        bounds = [(operator.index(start), operator.index(end)) for start, end in windows]
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise ConversionError(f"{path} does not hold the texts and windows of CALVIN's annotations") from error
    if len(texts) != len(bounds):
        raise ConversionError(f"{path} has {len(texts)} texts for {len(bounds)} windows")
    return [Annotation(start, end, _text(path, text)) for (start, end), text in zip(bounds, texts, strict=True)]


def _text(path: epath.Path, text: Any) -> str:
    if not isinstance(text, str):
        raise ConversionError(f"{path} has an annotation that is not text: {str(text)[:50]!r}")
    return " ".join(text.encode("utf-8", "replace").decode().split())
