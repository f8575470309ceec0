r"""Writes the model of a run for a robot that runs PyTorch, after checking that it computes the same there.

    python -m tools.export_torch --workdir RUN --out DIR
    python -m tools.export_torch --workdir RUN --out DIR --formats pt2,onnx

DIR then holds model.safetensors, config.json, provenance.json and README.md, a model card. It appears when all of it is
written and gives what the run gives.

`como_jax.runtime_torch.policy.Policy` loads a policy, with the scales of its robots; DIR also holds step.pt2 and
step.onnx if asked for. A motion model is loaded by `como_jax.runtime_torch.latent_motion.LatentMotion`; its DIR also
holds encoder/, which `ViTModel` of transformers loads, where the model has a ViT, and encode.pt2 and encode.onnx if
asked for.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from absl import flags

from como_jax import cli

try:
    from como_jax.export.pytorch.export import FORMATS, export_torch
    from como_jax.export.pytorch.export_policy import export_policy, is_policy
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit("error: tools.export_torch needs PyTorch: pip install 'como_jax[torch]'")

logger = logging.getLogger("como_jax.export_torch")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    flags.DEFINE_string("out", None, "Directory to be made.", required=True)
    flags.DEFINE_list("formats", [], f"Further formats of encode, or of one policy step: {', '.join(FORMATS)}.")


def main(arguments: Sequence[str]) -> None:
    """Reads the flags."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    export = export_policy if is_policy(given.workdir) else export_torch
    for name, error in export(given.workdir, given.out, given.formats).items():
        logger.info("%s: largest difference to JAX %.1e of the largest value", name, error)
    logger.info("Exported model: %s", given.out)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
