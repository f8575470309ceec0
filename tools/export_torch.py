r"""Writes the model of a run for a robot that runs PyTorch, after checking that it computes the same there.

    python -m tools.export_torch --workdir RUN --out DIR
    python -m tools.export_torch --workdir RUN --out DIR --formats pt2,onnx

DIR appears when everything is written and agrees with the run. It then holds model.safetensors, config.json,
requirements.txt, provenance.json and README.md, a model card.

`como_jax.runtime_torch.policy.Policy` loads a policy, with the normalisation of its robots;
`como_jax.runtime_torch.latent_motion.LatentMotion` loads a motion model. With --formats, DIR also holds one step of the
policy (step.pt2, step.onnx) or the encoding of the motion model (encode.pt2, encode.onnx) as a program. Beside a motion
model with a ViT, encoder/ holds it for `ViTModel` of transformers.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from absl import flags

from como_jax import cli

try:
    from como_jax.export.pytorch.contents import INSTALL
    from como_jax.export.pytorch.export import export_torch
    from como_jax.export.pytorch.programs import FORMATS
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit("error: tools.export_torch needs PyTorch: pip install 'como_jax[torch]'")

logger = logging.getLogger("como_jax.export_torch")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    flags.DEFINE_string("out", None, "Directory to be made.", required=True)
    flags.DEFINE_list("formats", [], f"Programs to write beside the weights: {', '.join(FORMATS)}.")


def main(arguments: Sequence[str]) -> None:
    """Exports the model and prints how far it is from JAX, and how a robot installs what it needs."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    for name, error in export_torch(given.workdir, given.out, given.formats).items():
        logger.info("%s: largest difference to JAX %.1e of the largest value", name, error)
    logger.info("Exported model: %s", given.out)
    print(f"On the robot, without JAX: {INSTALL.format(directory=given.out)}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
