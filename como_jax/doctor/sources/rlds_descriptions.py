"""Descriptions that were taken over from a template."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from como_jax.doctor.findings import Finding, Severity, name_some

# The example of https://github.com/kpertsch/rlds_dataset_builder has this text, to be replaced.
_TEMPLATE = re.compile(r"TODO\(|Markdown description of your dataset", re.IGNORECASE)
_PART = re.compile(r"(\d+)x ")


def check_descriptions(description: str, steps: Mapping[str, Any]) -> list[Finding]:
    """Descriptions that do not speak of this dataset.

    Args:
      description: of the dataset.
      steps: features of a step, by key.
    """
    faults = []
    if _TEMPLATE.search(description):
        faults.append("the dataset's own is still to be written")
    texts = {key: feature.doc.desc for key, feature in steps.items() if feature.doc.desc}
    for key, text in texts.items():
        parts, shape = [int(count) for count in _PART.findall(text)], steps[key].shape
        size = math.prod(shape) if None not in shape else None
        if parts and size is not None and sum(parts) != size:
            faults.append(f"{key} is described as {sum(parts)} numbers and has {size}")
    cameras = [key for key in texts if steps[key].np_dtype == np.uint8 and len(steps[key].shape) == 3]
    if len(cameras) > 1 and len({texts[key] for key in cameras}) == 1:
        faults.append(f"{len(cameras)} cameras share one, {texts[cameras[0]]!r}")
    if not faults:
        return []
    return [
        Finding(
            Severity.WARNING,
            "template-descriptions",
            f"Descriptions seem to be leftovers of a template: {name_some(faults)}.",
            "Do not go by them: look at the statistics and sample strips to learn what actions and cameras are.",
        )
    ]
