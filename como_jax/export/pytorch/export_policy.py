"""The export of a policy: weights, scales and card, all checked, in a folder that appears when it is complete."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from como_jax.data.language import read_embeddings
from como_jax.errors import ConfigError
from como_jax.export.pytorch import policy_graphs
from como_jax.export.pytorch.contents import describe_origin, save_tensors, write_contents
from como_jax.export.pytorch.policy_card import policy_card
from como_jax.export.pytorch.policy_parity import PolicyReference, check_policy, check_scales
from como_jax.files import write_atomic, write_json, write_text
from como_jax.policies.build import POLICY_FAMILIES, build_policy
from como_jax.policies.spec import PolicySpec
from como_jax.runtime_torch.instructions import EMBEDDINGS_NAME
from como_jax.runtime_torch.policy import Policy
from como_jax.staging import new_folder
from como_jax.training import sharding
from como_jax.training.run import Run, open_run, read_config
from como_jax.weights.policies import describe_policy, not_exported, policy_table

logger = logging.getLogger("como_jax.export_torch")


def is_policy(workdir: epath.PathLike) -> bool:
    """Whether a run is one of a policy; raises RunError where there is no run."""
    return read_config(epath.Path(workdir)).get("family") in POLICY_FAMILIES


def export_policy(workdir: epath.PathLike, out: epath.PathLike, formats: Sequence[str] = ()) -> dict[str, float]:
    """Exports the policy of a run and returns the largest relative differences to JAX, by what was compared.

    Args:
      workdir: of the run; the moving average of its parameters is taken where it has one.
      out: the folder to be made.
      formats: further ones, of one step: pt2, onnx.

    Raises:
      UsageError: no such run, a policy that cannot be exported, the folder is in the way, or PyTorch computes something
        else than JAX; `out` is not made then.
    """
    spec = PolicySpec.load(workdir)
    described = describe_policy(read_config(epath.Path(workdir)), spec)
    policy_graphs.check_formats(formats, described)
    with new_folder(out) as folder:
        # On the processor, whatever else there is: accelerators round float32 products.
        mesh = sharding.make_mesh(devices=jax.devices("cpu")[:1])
        run = open_run(workdir, mesh, POLICY_FAMILIES, build_policy, "is not a policy")
        left_out = write_policy(run, described, folder)
        logger.info("Comparing PyTorch with JAX")
        reference = PolicyReference(run, spec)
        policy = Policy.from_pretrained(folder, robot=reference.robot)
        check_scales(spec, policy)
        parity = check_policy(reference, policy)
        for name in formats:
            logger.info("Writing %s", name)
            parity |= policy_graphs.write_step(name, policy.module, reference, folder)
        provenance = describe_origin(run, parity, left_out)
        write_json(folder / "provenance.json", provenance)
        write_text(folder / "README.md", policy_card(described, provenance, policy.metadata, formats))
    return parity


def write_policy(run: Run, described: dict[str, Any], folder: epath.Path) -> list[str]:
    """Writes weights, config.json and what reads instructions; returns the paths of parameters that are left out.

    Raises:
      ConversionError: a parameter that is neither in the policy's table nor known as one that acting does not need.
    """
    _write_instructions(run.config, run.workdir, folder)
    return write_contents(folder, run.params, policy_table(described), described, not_exported(described))


def _write_instructions(config: ConfigDict, workdir: epath.Path, folder: epath.Path) -> None:
    """The tokenizer's file or the embeddings of instructions, where the policy has either."""
    if config.text.tower == "embedding":
        embeddings = dict(read_embeddings(workdir).items())
        table = np.stack([np.asarray(vector, np.float32) for vector in embeddings.values()])
        save_tensors({"embedding": table}, folder / EMBEDDINGS_NAME, instructions=json.dumps([*embeddings]))
    elif config.text.tokenizer_file:
        source = epath.Path(config.text.tokenizer_file)
        if not source.is_file():
            raise ConfigError(f"text.tokenizer_file {source} of the run does not exist any more; put it there again.")
        write_atomic(folder / source.name, lambda file: file.write(source.read_bytes()))
