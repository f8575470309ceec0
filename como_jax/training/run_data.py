"""The data of a run, as RUN/data.json keeps them: what each dataset was, and the scales of the run's first start.

started    step 0, and the identity of every dataset by its directory
resumed    one more such entry for every time that the run was resumed with other data
scales     by the name of a dataset, what normalises its numbers; they never change
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from como_jax.data.identity import Identity, changes, identify
from como_jax.errors import RunError, UsageError
from como_jax.files import write_json
from como_jax.spec.interface import POLICY_FILE, PolicySpec
from como_jax.spec.normalization import Normalizer, Scales, normalizer_from_json

DATA_FILE = "data.json"


def read_scales(workdir: epath.PathLike) -> dict[str, dict[str, Normalizer | None]]:
    """The scales with which a run was started; none where it has no checkpoint yet.

    Raises:
      RunError: the file with them is damaged.
    """
    if not _has_checkpoint(workdir):
        return {}
    found = _read(workdir)
    if found is None:
        # A run of a version that did not write the file.
        has_policy = (epath.Path(workdir) / POLICY_FILE).exists()
        robots = PolicySpec.load(epath.Path(workdir)).robots if has_policy else {}
        return {name: {"action": stats.action, "state": stats.state} for name, stats in robots.items()}
    try:
        return {
            name: {field: values and normalizer_from_json(values) for field, values in fields.items()}
            for name, fields in found["scales"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(workdir, error) from error


def check_data(workdir: epath.PathLike, datasets: Mapping[str, Identity]) -> None:
    """Raises RunError if a run has a checkpoint, and was trained on other data."""
    before = _last(workdir) if _has_checkpoint(workdir) else None
    if before is None:
        return
    found = {name: changes(before[name], now) for name, now in datasets.items() if name in before}
    if lines := [f"{name} ({'; '.join(texts)})" for name, texts in found.items() if texts]:
        raise RunError(
            f"{workdir} was trained on other data than what is there now: {', '.join(lines)}. Bring back the data, or "
            "choose a new `workdir`; `other_data` resumes all the same, and keeps the scales of the first start."
        )


def write_data(workdir: epath.PathLike, datasets: Mapping[str, Identity], scales: Scales, step: int) -> None:
    """Notes the data of a run that is about to train from a step."""
    entry = {"step": step, "datasets": dict(datasets)}
    found = _read(workdir) if _has_checkpoint(workdir) else None
    if found is None:
        found = {"started": entry, "resumed": [], "scales": {}}
    elif _last(workdir) != json.loads(json.dumps(entry["datasets"])):
        found["resumed"].append(entry)
    for name, fields in scales.items():
        found["scales"].setdefault(name, {field: values and values.to_json() for field, values in fields.items()})
    write_json(epath.Path(workdir) / DATA_FILE, found)


def changed_since(workdir: epath.PathLike) -> list[str]:
    """A sentence for each dataset of a run that is not any more what the run was trained on."""
    sentences = []
    for name, before in (_last(workdir) or {}).items():
        try:
            now = identify(name)
        except UsageError:
            continue  # It is not here, which does no harm by itself.
        # What only a run reads of its data, such as embeddings, is not in the identity of the dataset.
        if found := changes({fact: value for fact, value in before.items() if fact in now}, now):
            sentences.append(f"{name} is not what {workdir} was trained on: {'; '.join(found)}.")
    return sentences


def _has_checkpoint(workdir: epath.PathLike) -> bool:
    directory = epath.Path(workdir).resolve() / "checkpoints"
    return directory.exists() and bool(ocp.utils.checkpoint_steps(directory))


def _last(workdir: epath.PathLike) -> dict[str, Identity] | None:
    """The data that a run was last trained on; None where that is not known."""
    found = _read(workdir)
    if found is None:
        return None
    try:
        return [found["started"], *found["resumed"]][-1]["datasets"]
    except (KeyError, TypeError, LookupError) as error:
        raise _damaged(workdir, error) from error


def _read(workdir: epath.PathLike) -> dict[str, Any] | None:
    try:
        return json.loads((epath.Path(workdir) / DATA_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise _damaged(workdir, error) from error


def _damaged(workdir: epath.PathLike, error: Exception) -> RunError:
    return RunError(
        f"{epath.Path(workdir) / DATA_FILE} is damaged, and says no more what the run was trained on: {error!r}. "
        "Remove it to go on with the data that are there now."
    )
