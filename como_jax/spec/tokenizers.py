"""Tokenizers of instructions, the same in training and on a robot.

A tokenizer maps n instructions to int32 `[n, M]`, where M is the maximum length. Every entry is the id of a token plus
one, or 0 after the end of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from como_jax.errors import ConfigError


class Tokenizer(Protocol):
    """Maps instructions to token ids; see the module's docstring.

    Attributes:
      vocabulary_size: the largest token id plus one.
    """

    vocabulary_size: int

    def __call__(self, instructions: Sequence[str]) -> np.ndarray:
        """Token ids plus one, int32 `[n, M]`, 0 after the end of each instruction."""


# The tokens that the tokenizer.json of a tower puts first and last.
_ENDS = {"clip": ("<|startoftext|>", "<|endoftext|>"), "t5": (None, "</s>"), "tokens": (None, None)}
# The two ways in which a vocabulary writes a newline: a token of its own, or a byte.
_NEWLINES = ("\n", "<0x0A>")


def make_tokenizer(tower: str, max_length: int, file: Path | str = "") -> Tokenizer:
    """The tokenizer of a text tower.

    Args:
      tower: "bytes", "clip", "t5" or "tokens".
      max_length: most tokens of an instruction.
      file: the tokenizer.json that comes with the tower's weights, or for "tokens" also a .model file of SentencePiece.
        "bytes" needs none; "tokens" without one reads bytes too.

    Raises:
      ConfigError: the tower reads no tokens, or the tokenizer's file or library is missing.
    """
    if tower == "bytes" or (tower == "tokens" and not file):
        return ByteTokenizer(max_length)
    if tower not in _ENDS:
        raise ConfigError(f"text.tower={tower} reads no tokens; choose one of bytes, {', '.join(_ENDS)}.")
    if not file:
        raise ConfigError(
            f"text.tower={tower} needs text.tokenizer_file, the tokenizer.json that comes with its weights."
        )
    if tower == "tokens" and str(file).endswith(".model"):
        return SentencePieceTokenizer(file, max_length)
    return FileTokenizer(file, max_length, tower)


class ByteTokenizer:
    """Every byte of the UTF-8 text is a token."""

    vocabulary_size = 256

    def __init__(self, max_length: int):
        self.max_length = max_length

    def __call__(self, instructions: Sequence[str]) -> np.ndarray:
        """See `Tokenizer`; raises ConfigError if an instruction is too long."""
        return _pad(instructions, [list(text.encode()) for text in instructions], self.max_length, "bytes")


class FileTokenizer:
    """A tokenizer in Hugging Face's format, tokenizer.json.

    Attributes:
      vocabulary_size: the largest token id plus one.
    """

    def __init__(self, path: Path | str, max_length: int, kind: str):
        """Reads the file.

        Args:
          path: path of tokenizer.json.
          max_length: most tokens of an instruction, including those that mark its begin and end.
          kind: the model that the tokenizer must belong to, "clip" or "t5"; "tokens" for any.

        Raises:
          ConfigError: the library is not installed, or the file is missing, damaged or of another kind.
        """
        try:
            # It belongs to an extra, so it may be missing.
            import tokenizers
        except ImportError as error:
            raise _missing_library(path, "tokenizers", error) from error
        path = _existing(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text())
        # The library raises no class of its own.
        except Exception as error:
            raise ConfigError(f"text.tokenizer_file {path} is not a tokenizer.json: {error}") from error
        # The file may ask for both. `_pad` pads, and an instruction must not be cut off silently.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.max_length = max_length
        self.vocabulary_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._check_ends(path, kind)

    def __call__(self, instructions: Sequence[str]) -> np.ndarray:
        """See `Tokenizer`; raises ConfigError if an instruction is too long."""
        # One by one: for a batch the library starts threads, which break the worker processes of a loader.
        ids = [self._tokenizer.encode(text).ids for text in instructions]
        return _pad(instructions, ids, self.max_length, "tokens")

    def _check_ends(self, path: Path, kind: str) -> None:
        tokens = self._tokenizer.encode("").tokens or [""]
        for token, expected, place in zip((tokens[0], tokens[-1]), _ENDS[kind], ("first", "last"), strict=True):
            if expected not in (None, token):
                raise ConfigError(
                    f"text.tokenizer_file {path} does not put {expected} {place}, as the tokenizer of {kind} does; use "
                    "the tokenizer.json that lies beside the tower's weights."
                )


class SentencePieceTokenizer:
    """A tokenizer of SentencePiece. A text begins with <bos> and ends with a newline, as PaliGemma's prompts do.

    Attributes:
      vocabulary_size: number of tokens.
    """

    def __init__(self, path: Path | str, max_length: int):
        """Reads the file.

        Args:
          path: path of the .model file.
          max_length: most tokens of an instruction, including <bos> and the newline.

        Raises:
          ConfigError: the library is not installed, or the file is missing, damaged or lacks one of these two tokens.
        """
        try:
            # It belongs to an extra, so it may be missing.
            import sentencepiece
        except ImportError as error:
            raise _missing_library(path, "sentencepiece", error) from error
        path = _existing(path)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise ConfigError(f"text.tokenizer_file {path} is not a .model file of SentencePiece: {error}") from error
        self.max_length = max_length
        self.vocabulary_size = self._processor.vocab_size()
        self._begin, end = self._processor.bos_id(), self._processor.encode("\n")[-1:]
        if self._begin < 0:
            raise ConfigError(f"text.tokenizer_file {path} has no token <bos>; use the tokenizer of PaliGemma.")
        if not end or self._processor.id_to_piece(end[0]) not in _NEWLINES:
            raise ConfigError(f"text.tokenizer_file {path} has no token for a newline; use the tokenizer of PaliGemma.")
        self._end = end[0]

    def __call__(self, instructions: Sequence[str]) -> np.ndarray:
        """See `Tokenizer`; raises ConfigError if an instruction is too long."""
        # One by one, for the same reason as in `FileTokenizer`.
        ids = [[self._begin, *self._processor.encode(text), self._end] for text in instructions]
        return _pad(instructions, ids, self.max_length, "tokens")


def _missing_library(path: Path | str, library: str, error: ImportError) -> ConfigError:
    return ConfigError(f"{path} needs the library {library} ({error}); install it with: pip install {library}")


def _existing(path: Path | str) -> Path:
    # Training also gives paths of buckets, which have the methods of a Path.
    path = Path(path) if isinstance(path, str) else path
    if not path.is_file():
        raise ConfigError(f"text.tokenizer_file {path} does not exist; it comes with the weights that read its tokens.")
    return path


def _pad(instructions: Sequence[str], ids: Sequence[Sequence[int]], max_length: int, unit: str) -> np.ndarray:
    """Token ids plus one, int32 `[n, max_length]`, padded with zeros."""
    rows = np.zeros((len(ids), max_length), np.int32)
    for row, instruction, numbers in zip(rows, instructions, ids, strict=True):
        if len(numbers) > max_length:
            raise ConfigError(
                f"The instruction {instruction!r} has {len(numbers)} {unit}, more than the {max_length} of "
                f"text.max_length; raise it to at least {len(numbers)}."
            )
        row[: len(numbers)] = np.asarray(numbers, np.int32) + 1
    return rows
