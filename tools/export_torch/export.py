"""The export of a run: weights, further formats and card, all checked, in a folder that appears when it is complete."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors.numpy import save_file

from como_jax.errors import ConfigError
from como_jax.files import write_json, write_text
from como_jax.labelling.provenance import hash_params
from como_jax.runtime_torch.config import FORMAT, VERSION
from como_jax.runtime_torch.files import CONFIG_NAME
from como_jax.runtime_torch.latent_motion import LatentMotion
from como_jax.training import sharding
from como_jax.training.run import Run, load_run
from como_jax.weights.motion import NOT_EXPORTED, WEIGHTS_NAME, describe_motion_model, motion_table
from como_jax.weights.tables import write_tensors
from tools.export_torch import graphs, hf_encoder
from tools.export_torch.card import model_card
from tools.export_torch.output import new_folder
from tools.export_torch.parity import Reference, check_parity, compare

logger = logging.getLogger("como_jax.export_torch")

FORMATS = {"pt2": graphs.write_pt2, "onnx": graphs.write_onnx}
"""What writes a program of `encode` into a folder and gives back a function that runs it."""

_LIBRARIES = ("como_jax", "jax", "flax", "numpy", "safetensors", "torch")


def export_torch(workdir: epath.PathLike, out: epath.PathLike, formats: Sequence[str] = ()) -> dict[str, float]:
    """Exports the motion model of a run and returns the largest relative differences to JAX, by what was compared.

    Args:
      workdir: of the run.
      out: the folder to be made.
      formats: further ones, of `FORMATS`.

    Raises:
      UsageError: no such run, the folder is in the way, a package for a format is missing, or PyTorch computes
        something else than JAX; `out` is not made then.
    """
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"--formats {name!r} must be one of {', '.join(FORMATS)}.")
        graphs.check_installed(name)
    with new_folder(out, workdir) as folder:
        # On the processor, whatever else there is: accelerators round float32 products.
        run = load_run(workdir, sharding.make_mesh(devices=jax.devices("cpu")[:1]))
        described, left_out = write_model(run, folder)
        logger.info("Comparing PyTorch with JAX")
        reference, model = Reference(run), LatentMotion.from_pretrained(folder)
        parity = check_parity(reference, model)
        if run.config.family == "como":
            parity |= hf_encoder.write_encoder(run, described, folder / "encoder", model)
        for name in formats:
            logger.info("Writing %s", name)
            encode = FORMATS[name](model.module, reference.frames, folder)
            parity |= compare(reference, encode, f"encode.{name}")
        provenance = describe_origin(run, parity, left_out)
        write_json(folder / "provenance.json", provenance)
        write_text(folder / "README.md", model_card(described, provenance, model.config.latent_shape, formats))
    return parity


def write_model(run: Run, folder: epath.Path) -> tuple[dict[str, Any], list[str]]:
    """Writes weights and config.json; returns what the latter says, and the paths of parameters that are left out.

    Raises:
      ConversionError: a parameter that is neither in the model's table nor known as one that only training needs.
    """
    described = describe_motion_model(run.config)
    params = traverse_util.flatten_dict(jax.tree.map(np.asarray, run.params), sep="/")
    left_out = sorted(path for path in params if any(f"{path}/".startswith(f"{name}/") for name in NOT_EXPORTED))
    tensors = write_tensors(motion_table(described), {p: value for p, value in params.items() if p not in left_out})
    path = folder / WEIGHTS_NAME
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    weights = {"file": WEIGHTS_NAME, "sha256": digest}
    write_json(folder / CONFIG_NAME, {"format": FORMAT, "format_version": VERSION, **described, "weights": weights})
    return described, left_out


def describe_origin(run: Run, parity: dict[str, float], left_out: Sequence[str]) -> dict[str, Any]:
    """Where an exported model comes from: the content of provenance.json."""
    return {
        "run": str(run.workdir),
        "step": run.step,
        "parameters": hash_params(run.params),
        "datasets": run.config.data.mixture,
        "exported": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: metadata.version(name) for name in _LIBRARIES},
        "largest relative difference to JAX": parity,
        "left out": list(left_out),
        "config": json.loads(run.config.to_json_best_effort()),
    }
