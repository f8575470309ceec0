"""The export of a motion model: weights, further formats and card, in a folder that appears when it is complete."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from como_jax.errors import ConfigError, ConversionError
from como_jax.export.pytorch import graphs, hf_encoder
from como_jax.export.pytorch.card import model_card
from como_jax.export.pytorch.contents import describe_origin, write_contents
from como_jax.export.pytorch.parity import Reference, check_parity, compare
from como_jax.files import write_json, write_text
from como_jax.runtime_torch.latent_motion import LatentMotion
from como_jax.staging import new_folder
from como_jax.training import sharding
from como_jax.training.run import Run, load_run
from como_jax.weights.motion import NOT_EXPORTED, describe_motion_model, motion_table

logger = logging.getLogger("como_jax.export_torch")

FORMATS = {"pt2": graphs.write_pt2, "onnx": graphs.write_onnx}
"""What writes a program of `encode` into a folder and gives back a function that runs it."""


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
    with new_folder(out) as folder:
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
    if run.config.get("released_code"):
        raise ConversionError(
            f"{run.workdir} holds weights of the released code of LAPA, Moto or CoMo, whose computation the PyTorch "
            "runtime has not; use these weights with that code, or train a model of this project."
        )
    described = describe_motion_model(run.config)
    return described, write_contents(folder, run.params, motion_table(described), described, NOT_EXPORTED)
