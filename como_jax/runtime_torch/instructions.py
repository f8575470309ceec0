"""Instructions as a policy's text tower reads them: numbers of tokens, or embeddings that lie beside the weights."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from como_jax.errors import InputError, ModelFileError
from como_jax.spec.exported import EMBEDDINGS_NAME
from como_jax.spec.towers import TextConfig

Reader = Callable[[str], np.ndarray]

# The tokens that the tokenizer.json of a tower puts first and last.
_ENDS = {"clip": ("<|startoftext|>", "<|endoftext|>"), "t5": (None, "</s>")}


def make_reader(config: TextConfig, directory: Path) -> Reader:
    """What makes int32 `[M]`, numbers of tokens plus one and then zeros, or float32 `[E]`, of an instruction.

    The reader raises InputError where an instruction is too long, or has no embedding.

    Raises:
      ModelFileError: a file of the folder, or a package that reads it, is missing.
    """
    if config.tower == "embedding":
        return _embeddings(directory / EMBEDDINGS_NAME, config.embedding_size)
    tokenize = _tokenizer(config, directory)

    def read(instruction: str) -> np.ndarray:
        numbers = tokenize(config.prompt.replace("{}", instruction))
        if len(numbers) > config.max_length:
            raise InputError(
                f"instruction {instruction!r} is {len(numbers)} tokens long with what is put around it, more than the "
                f"{config.max_length} that the policy reads."
            )
        row = np.zeros(config.max_length, np.int32)
        row[: len(numbers)] = np.asarray(numbers, np.int32) + 1
        return row

    return read


def _tokenizer(config: TextConfig, directory: Path) -> Callable[[str], Sequence[int]]:
    if not config.tokenizer_file:
        return lambda text: list(text.encode())
    # A name alone, so that a model from elsewhere cannot lead out of its folder.
    path = directory / Path(config.tokenizer_file).name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error
    if config.tower == "tokens" and path.suffix == ".model":
        return _sentencepiece(path, content)
    return _tokenizer_json(path, content, config)


def _sentencepiece(path: Path, content: bytes) -> Callable[[str], Sequence[int]]:
    """Texts that begin with <bos> and end with a newline, as PaliGemma's prompts do."""
    processor = _import("sentencepiece", path).SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise ModelFileError(f"{path} is no .model file of SentencePiece: {error}") from error
    end = processor.encode("\n")[-1:]
    return lambda text: [processor.bos_id(), *processor.encode(text), *end]


def _tokenizer_json(path: Path, content: bytes, config: TextConfig) -> Callable[[str], Sequence[int]]:
    library = _import("tokenizers", path)
    try:
        tokenizer = library.Tokenizer.from_str(content.decode())
    # The library raises nothing more specific.
    except Exception as error:
        raise ModelFileError(f"{path} is no tokenizer.json: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if config.tower in _ENDS:
        _check_kind(tokenizer, path, config)
    return lambda text: tokenizer.encode(text).ids


def _check_kind(tokenizer: Any, path: Path, config: TextConfig) -> None:
    """Raises ModelFileError unless a tokenizer is of the tower's kind and size."""
    tokens = tokenizer.encode("").tokens or [""]
    for token, expected, place in zip((tokens[0], tokens[-1]), _ENDS[config.tower], ("first", "last"), strict=True):
        if expected not in (None, token):
            raise ModelFileError(
                f"{path} does not put {expected} {place}, as that of {config.tower} does; copy the model again."
            )
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= config.vocabulary_size:
        raise ModelFileError(
            f"{path} has a token {largest}, and the policy knows {config.vocabulary_size}; copy the model again."
        )


def _import(library: str, path: Path) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ModelFileError(f"{path} needs the package {library}: pip install {library}") from error


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
