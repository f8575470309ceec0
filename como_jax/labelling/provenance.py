"""Where labels come from: enough to make them again, and to know whether two sets are alike."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib import metadata
from typing import Any

import jax
import numpy as np

from como_jax.labelling.shards import LabelShard
from como_jax.motion.build import codebook_size
from como_jax.nn.model_def import Params
from como_jax.training.run import Run

_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "simplejpeg", "opencv-python-headless")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How a dataset is labelled.

    Attributes:
      gap_seconds: time between the two frames of a pair; the run's by default, whatever the dataset's control rate.
      camera: observation key; empty for the dataset's first camera.
      fit: how pictures become square, see `como_jax.data.transforms`.
      batch_size: frames at once, on all devices of a host.
    """

    gap_seconds: float
    camera: str = ""
    fit: str = "crop"
    batch_size: int = 64


def hash_params(params: Params) -> str:
    """A digest of all numbers of a model, in the order of their names."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda item: str(item[0])):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def describe(
    run: Run, params_hash: str, directory: str, shards: list[LabelShard], settings: LabelSettings
) -> dict[str, Any]:
    """All that decides what the labels are: the plan of a labelling, and most of what a labelled dataset says."""
    tables = json.dumps([dataclasses.asdict(shard) for shard in shards])
    return {
        "run": str(run.workdir),
        "step": run.step,
        "family": run.config.family,
        "parameters": params_hash,
        "latent_shape": list(latent_shape(run)),
        "codebook_size": codebook_size(run.config),
        "config": json.loads(run.config.to_json_best_effort()),
        "dataset": directory,
        "episodes and steps": hashlib.blake2b(tables.encode(), digest_size=16).hexdigest(),
        "settings": dataclasses.asdict(settings),
        "versions": {name: metadata.version(name) for name in _LIBRARIES},
        "backend": jax.default_backend(),
    }


def latent_shape(run: Run) -> tuple[int, int]:
    """Latent tokens of a transition, and numbers of each."""
    size = run.config.data.image_size
    frames = jax.ShapeDtypeStruct((1, 2, size, size, 3), np.uint8)
    return jax.eval_shape(lambda params, frames: run.model.bind(params).encode(frames), run.params, frames).shape[2:]
