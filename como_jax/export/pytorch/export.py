"""Exports the model of a run for PyTorch: a folder with weights, config, programs and card that appears when
complete."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from como_jax.data.instructions import read_embeddings
from como_jax.errors import ConfigError, ConversionError
from como_jax.export.pytorch.card import motion_card, policy_card
from como_jax.export.pytorch.contents import describe_origin, save_tensors, write_contents
from como_jax.export.pytorch.hf_encoder import write_encoder
from como_jax.export.pytorch.parity import Reference, check_parity
from como_jax.export.pytorch.policy_parity import PolicyReference, check_normalization, check_policy
from como_jax.export.pytorch.programs import check_formats, write_encode, write_step
from como_jax.files import write_atomic, write_json, write_text
from como_jax.policies.models import POLICY_FAMILIES, build_policy
from como_jax.runtime_torch.latent_motion import LatentMotion
from como_jax.runtime_torch.policy import Policy
from como_jax.spec.exported import EMBEDDINGS_NAME, ExportedMotion, ExportedPolicy
from como_jax.spec.interface import PolicySpec
from como_jax.staging import new_folder
from como_jax.training import sharding
from como_jax.training.run import Run, load_run, open_run, read_config
from como_jax.weights.motion import NOT_EXPORTED, describe_motion_model, motion_table
from como_jax.weights.policies import describe_policy, not_exported, policy_table

logger = logging.getLogger("como_jax.export_torch")


def export_torch(workdir: epath.PathLike, out: epath.PathLike, formats: Sequence[str] = ()) -> dict[str, float]:
    """Exports the motion model or the policy of a run.

    Args:
      workdir: of the run. If a policy has a moving average of its parameters, that is exported.
      out: the folder to be made.
      formats: of programs to be written beside the weights; see `programs.FORMATS`.

    Returns:
      The largest relative differences between PyTorch and JAX, by what was compared.

    Raises:
      UsageError: there is no such run, its model cannot be exported, `out` exists, a package for a format is missing,
        or PyTorch computes something else than JAX. `out` is not made then.
    """
    is_policy = read_config(epath.Path(workdir)).get("family") in POLICY_FAMILIES
    return (_export_policy if is_policy else _export_motion_model)(workdir, out, formats)


def _export_motion_model(workdir: epath.PathLike, out: epath.PathLike, formats: Sequence[str]) -> dict[str, float]:
    check_formats(formats)
    with new_folder(out) as folder:
        run = load_run(workdir, _cpu_mesh())
        described, left_out = write_model(run, folder)
        logger.info("Comparing PyTorch with JAX")
        reference, model = Reference(run), LatentMotion.from_pretrained(folder)
        parity = check_parity(reference, model)
        if described.encoder is not None:
            parity |= write_encoder(run, described.encoder, folder / "encoder", model)
        for name in formats:
            logger.info("Writing %s", name)
            parity |= write_encode(name, model.module, reference, folder)
        provenance = describe_origin(run, parity, left_out)
        write_json(folder / "provenance.json", provenance)
        write_text(folder / "README.md", motion_card(described, provenance, formats))
    return parity


def _export_policy(workdir: epath.PathLike, out: epath.PathLike, formats: Sequence[str]) -> dict[str, float]:
    spec = PolicySpec.load(epath.Path(workdir))
    described = describe_policy(read_config(epath.Path(workdir)), spec)
    check_formats(formats, described)
    with new_folder(out) as folder:
        run = open_run(workdir, _cpu_mesh(), POLICY_FAMILIES, build_policy, "is not a policy")
        left_out = write_policy(run, described, folder)
        logger.info("Comparing PyTorch with JAX")
        reference = PolicyReference(run, spec)
        policy = Policy.from_pretrained(folder, robot=reference.robot)
        check_normalization(spec, policy)
        parity = check_policy(reference, policy)
        for name in formats:
            logger.info("Writing %s", name)
            parity |= write_step(name, policy.module, reference, folder)
        provenance = describe_origin(run, parity, left_out)
        write_json(folder / "provenance.json", provenance)
        write_text(folder / "README.md", policy_card(described, provenance, policy.spec, formats))
    return parity


def write_model(run: Run, folder: epath.Path) -> tuple[ExportedMotion, list[str]]:
    """Writes weights and config.json of a motion model.

    Returns:
      The description that config.json holds, and the paths of the parameters that were left out.

    Raises:
      ConversionError: a parameter is neither in the model's table nor known as one that only training needs, or the
        weights are of another project's code.
    """
    if run.config.get("released_code"):
        raise ConversionError(
            f"{run.workdir} holds weights of the released code of LAPA, Moto or CoMo, which computes differently from "
            "the PyTorch runtime; use these weights with that code, or train a model of this project."
        )
    described = describe_motion_model(run.config)
    return described, write_contents(folder, run.params, motion_table(described), described, NOT_EXPORTED)


def write_policy(run: Run, described: ExportedPolicy, folder: epath.Path) -> list[str]:
    """Writes weights and config.json of a policy, and the file that its instructions are read by.

    Returns:
      The paths of the parameters that were left out.

    Raises:
      ConversionError: a parameter is neither in the policy's table nor known as one that acting does not need.
    """
    _write_instructions(run.config, run.workdir, folder)
    return write_contents(folder, run.params, policy_table(described), described, not_exported(described))


def _write_instructions(config: ConfigDict, workdir: epath.Path, folder: epath.Path) -> None:
    """Writes the tokenizer's file or the embeddings of instructions, if the policy has either."""
    if config.text.tower == "embedding":
        embeddings = dict(read_embeddings(workdir).items())
        table = np.stack([np.asarray(vector, np.float32) for vector in embeddings.values()])
        save_tensors({"embedding": table}, folder / EMBEDDINGS_NAME, instructions=json.dumps([*embeddings]))
    elif config.text.tokenizer_file:
        source = epath.Path(config.text.tokenizer_file)
        if not source.is_file():
            raise ConfigError(f"text.tokenizer_file {source} of the run does not exist any more; put it there again.")
        write_atomic(folder / source.name, lambda file: file.write(source.read_bytes()))


def _cpu_mesh() -> jax.sharding.Mesh:
    """One CPU device: accelerators round the products of float32."""
    return sharding.make_mesh(devices=jax.devices("cpu")[:1])
