"""Instructions that LeRobot datasets keep in columns of their tables, beside the tasks."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa

from como_jax.convert.lerobot.metadata import Feature
from como_jax.convert.selection import Selection, nearest
from como_jax.errors import ConversionError

CHANGES = "a text changes within an episode: that of its first step counts"
# DROID has `language_instruction`, `language_instruction_2` and `language_instruction_3`.
_USUAL = re.compile(r"(observation\.)?((natural_)?language|(natural_)?(language_)?instruction)(_\d+)?")
# Columns that GR00T's datasets keep as numbers of tasks, and others that hold labels.
_LIKE_LABELS = re.compile(r"instruct|language|caption|prompt|annotation|narration|task_desc", re.IGNORECASE)


def language_columns(features: Mapping[str, Feature], stored: Collection[str], wanted: str | None) -> str:
    """Returns the columns of instructions, separated by commas: those asked for, or by default the usual ones.

    Raises:
      ConversionError: a column does not exist, or holds neither texts nor numbers of tasks.
    """
    texts = {key: feature for key, feature in features.items() if key in stored and _may_hold_texts(feature)}
    if wanted is None:
        return ",".join(key for key, each in texts.items() if each.dtype == "string" and _USUAL.fullmatch(key))
    for key in Selection({}, language=wanted).language_keys:
        if key not in texts:
            named = like_labels(texts) or list(texts)
            raise ConversionError(f"no language key {key!r} in the tables of this dataset{nearest(key, named)}")
    return wanted


def like_labels(features: Mapping[str, Feature]) -> list[str]:
    """Returns the columns that look as if they held instructions."""
    return [key for key, each in features.items() if _may_hold_texts(each) and _LIKE_LABELS.search(key)]


def column_texts(table: pa.Table, columns: Sequence[str], tasks: Mapping[int, str]) -> tuple[list[str], list[str]]:
    """Returns the texts of the first step that has any, of every column, and what is unusual about them."""
    texts: list[str] = []
    warnings: list[str] = []
    for column in columns:
        values = [_text(value, tasks) for value in table[column].unique().to_pylist()]
        found = [value for value in values if value]
        texts += found[:1]
        if len(found) > 1:
            warnings.append(CHANGES)
    return texts, warnings


def _text(value: object, tasks: Mapping[int, str]) -> str:
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return tasks.get(value, "") if isinstance(value, int) else value.strip() if isinstance(value, str) else ""


def _may_hold_texts(feature: Feature) -> bool:
    try:
        return feature.dtype == "string" or np.dtype(feature.dtype).kind in "iu"
    except TypeError:
        return False
