"""The files of every exported folder: weights, config.json, requirements.txt and provenance.json."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata, resources
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from como_jax.files import write_json, write_text
from como_jax.labelling.labelling import hash_params
from como_jax.nn.model_def import Params
from como_jax.spec.exported import CONFIG_NAME, FORMAT, VERSION, WEIGHTS_NAME, ExportedMotion, ExportedPolicy
from como_jax.training.run import Run
from como_jax.weights.tables import DeepTable, write_tensors

REQUIREMENTS_NAME = "requirements.txt"
INSTALL = f"pip install --no-deps como_jax && pip install -r {{directory}}/{REQUIREMENTS_NAME}"
"""The line that installs the runtime for an exported folder on a robot, without JAX."""

_LIBRARIES = ("como_jax", "jax", "flax", "numpy", "safetensors", "torch")


def write_contents(
    folder: epath.Path,
    params: Params,
    table: DeepTable,
    described: ExportedMotion | ExportedPolicy,
    unneeded: Collection[str],
) -> list[str]:
    """Writes weights, config.json and requirements.txt.

    Args:
      folder: that gets the files.
      params: of the run.
      table: of the model.
      described: the model, for config.json.
      unneeded: prefixes of the paths of parameters that only training needs.

    Returns:
      The paths of the parameters that were left out.

    Raises:
      ConversionError: a parameter is neither in the table nor unneeded.
    """
    flat = flatten_params(params)
    left_out = sorted(path for path in flat if any(f"{path}/".startswith(f"{name}/") for name in unneeded))
    tensors = write_tensors(table, {path: value for path, value in flat.items() if path not in left_out})
    path = folder / WEIGHTS_NAME
    save_tensors(tensors, path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    weights = {"file": WEIGHTS_NAME, "sha256": digest}
    write_json(
        folder / CONFIG_NAME, {"format": FORMAT, "format_version": VERSION, **described.to_json(), "weights": weights}
    )
    write_text(folder / REQUIREMENTS_NAME, _requirements(described))
    return left_out


def save_tensors(tensors: Mapping[str, np.ndarray], path: epath.Path, **metadata: str) -> None:
    """Writes a safetensors file that everyone may read."""
    save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    # The library makes files that only their owner may read.
    os.chmod(path, 0o644)


def flatten_params(params: Params) -> dict[str, np.ndarray]:
    """Parameters by their paths; modules in lists appear in them by their numbers."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(str(part.key) for part in path): np.asarray(value) for path, value in leaves}


def describe_origin(run: Run, parity: Mapping[str, float], left_out: Sequence[str]) -> dict[str, Any]:
    """The content of provenance.json: where the model comes from."""
    return {
        "run": str(run.workdir),
        "step": run.step,
        "parameters": hash_params(run.params),
        "datasets": run.config.data.mixture,
        "exported": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: metadata.version(name) for name in _LIBRARIES},
        "largest relative difference to JAX": dict(parity),
        "left out": list(left_out),
        "config": json.loads(run.config.to_json_best_effort()),
    }


def _requirements(described: ExportedMotion | ExportedPolicy) -> str:
    """requirements.txt of the runtime, with the packages that read this policy's instructions."""
    lines = (resources.files("como_jax.runtime_torch") / REQUIREMENTS_NAME).read_text()
    if isinstance(described, ExportedMotion):
        return lines
    text = described.observation.text
    if text.tokenizer_file:
        lines += "sentencepiece>=0.2\n" if text.tokenizer_file.endswith(".model") else "tokenizers>=0.19\n"
    return lines
