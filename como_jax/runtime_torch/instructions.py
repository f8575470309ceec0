"""Instructions as a policy's text tower reads them: token ids, or embeddings that lie beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from como_jax.errors import ConfigError, InputError, ModelFileError
from como_jax.spec.exported import EMBEDDINGS_NAME
from como_jax.spec.tokenizers import make_tokenizer
from como_jax.spec.towers import PUBLIC_TOWERS, TextConfig

Reader = Callable[[str], np.ndarray]


def make_reader(config: TextConfig, directory: Path) -> Reader:
    """What maps an instruction to token ids plus one, int32 `[M]` padded with zeros, or to an embedding, float32 `[E]`.

    The reader raises InputError for an instruction that is too long or has no embedding.

    Raises:
      ModelFileError: a file of the folder, or a package that reads it, is missing.
    """
    if config.tower == "embedding":
        return _embeddings(directory / EMBEDDINGS_NAME, config.embedding_size)
    # Only the name, so that a model from elsewhere cannot point out of its folder.
    path = directory / Path(config.tokenizer_file).name if config.tokenizer_file else ""
    try:
        tokenizer = make_tokenizer(config.tower, config.max_length, path)
    except ConfigError as error:
        raise ModelFileError(f"{error} Copy the model again.") from error
    if config.tower in PUBLIC_TOWERS and tokenizer.vocabulary_size > config.vocabulary_size:
        raise ModelFileError(
            f"{path} has {tokenizer.vocabulary_size} tokens, and the policy knows {config.vocabulary_size}; copy the "
            "model again."
        )

    def read(instruction: str) -> np.ndarray:
        try:
            return tokenizer([config.prompt.replace("{}", instruction)])[0]
        except ConfigError as error:
            raise InputError(f"instruction {instruction!r} is too long: {error}") from error

    return read


def _embeddings(path: Path, size: int) -> Reader:
    try:
        with safe_open(path, framework="np") as file:
            instructions, table = json.loads(file.metadata()["instructions"]), file.get_tensor("embedding")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    if table.shape != (len(instructions), size):
        raise ModelFileError(f"{path}: embedding is {list(table.shape)} and must be {[len(instructions), size]}.")
    rows = dict(zip(instructions, table.astype(np.float32), strict=True))

    def read(instruction: str) -> np.ndarray:
        if instruction not in rows:
            raise InputError(f"instruction {instruction!r} has no embedding among the {len(rows)} of the policy.")
        return rows[instruction]

    return read
