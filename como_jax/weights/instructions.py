"""Embeddings of a dataset's instructions by public text towers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from como_jax.data import schema
from como_jax.data.episode_table import has_split, read_episode_table
from como_jax.data.instructions import EMBEDDINGS_NAME, write_embeddings
from como_jax.errors import ConfigError, DatasetError
from como_jax.nn.text_towers import make_text_tower
from como_jax.ownership import claim
from como_jax.spec.tokenizers import FileTokenizer
from como_jax.spec.towers import TextConfig
from como_jax.weights.text import load_text_tower, text_config_of

logger = logging.getLogger(__name__)

TOWERS = ("clip", "t5")
_BATCH = 32
# The longest texts that T5 was trained on (arXiv 1910.10683, section 3.1.2); the weights of CLIP contain their limit.
_T5_LENGTH = 512


def embed_instructions(
    dataset: epath.PathLike,
    tower: str,
    weights: epath.PathLike,
    tokenizer: epath.PathLike,
    *,
    max_length: int | None = None,
) -> dict[str, np.ndarray]:
    """Embeds all instructions of a dataset and writes the embeddings into its directory.

    CLIP gives the features of the end-of-text token after the last norm, T5 the mean over all tokens.

    Args:
      dataset: directory of the dataset.
      tower: one of `TOWERS`.
      weights: of the tower, a .safetensors file beside config.json.
      tokenizer: the tokenizer.json of the weights.
      max_length: tokens of the longest instruction; None for what the tower was trained with.

    Returns:
      The embeddings by instruction, float32 `[D]` each.

    Raises:
      UsageError: dataset, weights or tokenizer do not exist or do not fit together.
    """
    instructions = read_instructions(dataset)
    claim(epath.Path(dataset), [EMBEDDINGS_NAME])
    config = text_config_of(weights, TextConfig(tower=tower))
    config = dataclasses.replace(config, max_length=max_length or config.positions or _T5_LENGTH)
    tokenize = FileTokenizer(epath.Path(tokenizer), config.max_length, tower)
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
    """The distinct instructions of all splits, sorted, with the empty one if an episode has none.

    Raises:
      DatasetError: the directory is no dataset.
    """
    episodes: list[str] = []
    others: set[str] = set()
    for split in schema.SPLITS:
        if has_split(dataset, split):
            table = read_episode_table(dataset, split, ["language_instruction", "other_instructions"])
            episodes += table["language_instruction"].to_pylist()
            others.update(text for texts in table["other_instructions"].to_pylist() for text in texts or ())
    if not episodes:
        raise DatasetError(f"{dataset} is not a dataset directory: it has no episode tables.")
    if empty := episodes.count(""):
        logger.warning("%d of %d episodes have no instruction: the empty one is embedded too.", empty, len(episodes))
    return sorted({*episodes, *others})


def _embed(text: np.ndarray, config: TextConfig, weights: epath.PathLike) -> np.ndarray:
    """Pooled features, float32 `[n, D]`, of token ids `[n, M]`."""
    read = _load_reader(config, weights)
    # Padding costs time and does not change features.
    text = text[:, : int((text != 0).any(axis=0).sum())]
    # The last batch is padded to the size of the others, so that all share one program.
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
