r"""Writes embeddings of a dataset's instructions into its directory, for policies with --config.text.tower=embedding.

    python -m tools.embed_instructions --dataset DATASET --tower clip --weights clip/model.safetensors \\
        --tokenizer clip/tokenizer.json

The weights are those of a CLIP text encoder or of a T5 encoder as Hugging Face saves them, with config.json beside
them. The instructions of all splits are embedded. An older `instruction_embeddings.parquet` is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from como_jax import cli
from como_jax.weights.instructions import TOWERS, embed_instructions


def define_flags() -> None:
    """Defines the flags of the command, by the names of the arguments of `embed_instructions`."""
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_enum("tower", None, TOWERS, "Kind of the weights.", required=True)
    flags.DEFINE_string("weights", None, "A .safetensors file, with config.json beside it.", required=True)
    flags.DEFINE_string("tokenizer", None, "The tokenizer.json of the weights.", required=True)
    flags.DEFINE_integer("max_length", None, "Tokens of the longest instruction [CLIP 77, T5 512].", lower_bound=1)


def main(arguments: Sequence[str]) -> None:
    """Embeds the instructions of one dataset."""
    cli.no_arguments(arguments)
    names = ("dataset", "tower", "weights", "tokenizer", "max_length")
    embed_instructions(**{name: flags.FLAGS[name].value for name in names})


if __name__ == "__main__":
    define_flags()
    cli.run(main)
