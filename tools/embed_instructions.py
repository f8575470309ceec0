r"""Writes embeddings of a dataset's instructions into its directory, for policies with --config.text.tower=embedding.

    python -m tools.embed_instructions --dataset DATASET --tower clip --weights clip/model.safetensors \
        --tokenizer clip/tokenizer.json

The weights are those of a CLIP text encoder or of a T5 encoder, as Hugging Face saves them, with config.json beside
them. All instructions of all splits are embedded: by CLIP, the features of the end-of-text token after the last norm,
and by T5, the mean of all tokens. An `instruction_embeddings.parquet` that is there already is replaced.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import nnx

from como_jax import cli
from como_jax.data import schema
from como_jax.data.language import FileTokenizer, write_embeddings
from como_jax.errors import ConfigError, DatasetError
from como_jax.nn.text_towers import make_text_tower
from como_jax.spec.towers import TextConfig
from como_jax.weights.text import load_text_tower, text_config_of

logger = logging.getLogger("como_jax.embed_instructions")

TOWERS = ("clip", "t5")
_BATCH = 32
# The longest texts that T5 was trained on (arXiv 1910.10683, section 3.1.2); CLIP's weights tell their own.
_T5_LENGTH = 512


def embed_instructions(
    dataset: epath.PathLike,
    tower: str,
    weights: epath.PathLike,
    tokenizer: epath.PathLike,
    *,
    max_length: int | None = None,
) -> dict[str, np.ndarray]:
    """Embeds all instructions of a dataset, writes them beside it, and returns them, float32 `[D]` each.

    Raises:
      UsageError: dataset, weights and tokenizer are not there or do not fit together.
    """
    instructions = read_instructions(dataset)
    config = text_config_of(weights, TextConfig(tower=tower))
    config = dataclasses.replace(config, max_length=max_length or config.positions or _T5_LENGTH)
    tokenize = FileTokenizer(tokenizer, config.max_length, tower)
    if tokenize.vocabulary_size > config.vocabulary_size:
        raise ConfigError(
            f"{tokenizer} has {tokenize.vocabulary_size} tokens and {weights} only {config.vocabulary_size}: they do "
            "not belong together."
        )
    embeddings = dict(zip(instructions, _embed(tokenize(instructions), config, weights), strict=True))
    path = write_embeddings(dataset, embeddings)
    logger.info("%d instructions embedded in %d numbers each: %s", len(embeddings), config.width, path)
    return embeddings


def read_instructions(dataset: epath.PathLike) -> list[str]:
    """The different instructions of all splits, sorted; the empty one too, where an episode has none.

    Raises:
      DatasetError: not a dataset.
    """
    episodes: list[str] = []
    for split in schema.SPLITS:
        if any(epath.Path(dataset).glob(f"episodes-{split}-*.parquet")):
            episodes += schema.read_episode_table(dataset, split)["language_instruction"].to_pylist()
    if not episodes:
        raise DatasetError(f"{dataset} is not a dataset directory: it has no episode tables.")
    if empty := episodes.count(""):
        logger.warning("%d of %d episodes have no instruction: the empty one is embedded too.", empty, len(episodes))
    return sorted(set(episodes))


def _embed(text: np.ndarray, config: TextConfig, weights: epath.PathLike) -> np.ndarray:
    """Pooled features, float32 `[n, D]`, of token ids `[n, M]`."""
    read = _load_reader(config, weights)
    # Padding changes no features, and costs time.
    text = text[:, : int((text != 0).any(axis=0).sum())]
    # The last batch is as long as the others, so that all share one program.
    padded = np.pad(text, ((0, -len(text) % _BATCH), (0, 0)))
    batches = padded.reshape(-1, _BATCH, padded.shape[1])
    return np.concatenate([read(batch) for batch in batches])[: len(text)]


def _load_reader(config: TextConfig, weights: epath.PathLike) -> Callable[[np.ndarray], np.ndarray]:
    module = nnx.eval_shape(lambda: make_text_tower(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graphdef = nnx.split(module)[0]
    params = jax.device_put(load_text_tower(weights))

    @jax.jit
    def read(params: dict, text: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).read(text).pooled

    return lambda text: np.asarray(read(params, text))


def define_flags() -> None:
    """Defines the flags of the command, by the names of the arguments of `embed_instructions`."""
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_enum("tower", None, TOWERS, "Kind of the weights.", required=True)
    flags.DEFINE_string("weights", None, "A .safetensors file, with config.json beside it.", required=True)
    flags.DEFINE_string("tokenizer", None, "The tokenizer.json of the weights.", required=True)
    flags.DEFINE_integer("max_length", None, "Tokens of the longest instruction [CLIP 77, T5 512].", lower_bound=1)


def main(arguments: Sequence[str]) -> None:
    """Reads the flags."""
    cli.no_arguments(arguments)
    names = ("dataset", "tower", "weights", "tokenizer", "max_length")
    embed_instructions(**{name: flags.FLAGS[name].value for name in names})


if __name__ == "__main__":
    define_flags()
    cli.run(main)
