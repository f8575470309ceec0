"""Instructions as numbers: token ids for a text tower, or embeddings made beforehand.

Tokenizers are callables from instructions to int32 `[n, M]`, where M is the longest length: the number of a token plus
one, and 0 after the text has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from como_jax.errors import ConfigError, DatasetError
from como_jax.files import write_atomic

EMBEDDINGS_NAME = "instruction_embeddings.parquet"
EMBEDDINGS_SCHEMA = pa.schema(
    [
        pa.field("instruction", pa.string(), nullable=False),
        pa.field("embedding", pa.list_(pa.float32()), nullable=False),
    ]
)


class Tokenizer(Protocol):
    """See the module's docstring.

    Attributes:
      vocabulary_size: one more than the largest number of a token.
    """

    vocabulary_size: int

    def __call__(self, instructions: Sequence[str]) -> np.ndarray:
        """int32 `[n, M]`."""


# The tokens that the tokenizer.json of a tower puts first and last.
_ENDS = {"clip": ("<|startoftext|>", "<|endoftext|>"), "t5": (None, "</s>"), "tokens": (None, None)}
# A newline as a token of its own, or as a byte.
_NEWLINES = ("\n", "<0x0A>")


def make_tokenizer(tower: str, max_length: int, file: epath.PathLike = "") -> Tokenizer:
    """The tokenizer of a text tower.

    Args:
      tower: "bytes", "clip", "t5" or "tokens".
      max_length: tokens of the longest instruction.
      file: tokenizer.json of the tower's weights, which puts its own tokens first and last, or for "tokens" a .model
        file of SentencePiece. The byte-level tower has none, and without one "tokens" reads bytes too.

    Raises:
      ConfigError: no such tokenizer, or its file or library is missing.
    """
    if tower == "bytes" or (tower == "tokens" and not file):
        return ByteTokenizer(max_length)
    if tower not in _ENDS:
        raise ConfigError(f"text.tower={tower} reads no tokens; those that do are bytes, {', '.join(_ENDS)}.")
    if not file:
        raise ConfigError(
            f"text.tower={tower} needs text.tokenizer_file, the tokenizer.json that comes with its weights."
        )
    if tower == "tokens" and epath.Path(file).suffix == ".model":
        return SentencePieceTokenizer(file, max_length)
    return FileTokenizer(file, max_length, tower)


class ByteTokenizer:
    """The bytes of the UTF-8 text, as the byte-level tower reads them."""

    vocabulary_size = 256

    def __init__(self, max_length: int):
        self.max_length = max_length

    def __call__(self, instructions: Sequence[str]) -> np.ndarray:
        """int32 `[n, M]`; raises ConfigError where an instruction is too long."""
        return _pad(instructions, [list(text.encode()) for text in instructions], self.max_length, "bytes")


class FileTokenizer:
    """A tokenizer in Hugging Face's format, tokenizer.json.

    Attributes:
      vocabulary_size: one more than the largest number of a token.
    """

    def __init__(self, path: epath.PathLike, max_length: int, kind: str):
        """Reads the file.

        Args:
          path: of tokenizer.json.
          max_length: tokens of the longest instruction, those that stand for its begin and end included.
          kind: "clip" or "t5", of which model it must be, or "tokens" for any.

        Raises:
          ConfigError: the library is not installed, or the file is missing, unreadable or of another kind.
        """
        try:
            # Of an extra, so not at the top.
            import tokenizers
        except ImportError as error:
            raise _missing_library(path, "tokenizers", error) from error
        path = _existing(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text())
        # The library raises nothing more specific.
        except Exception as error:
            raise ConfigError(f"text.tokenizer_file {path} is no tokenizer.json: {error}") from error
        # The file may ask for both. Padding is made here, and nothing may be cut off in silence.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.max_length = max_length
        self.vocabulary_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._check_ends(path, kind)

    def __call__(self, instructions: Sequence[str]) -> np.ndarray:
        """int32 `[n, M]`; raises ConfigError where an instruction is too long."""
        # Not as a batch, for which the library starts threads, that the worker processes of a loader must not inherit.
        ids = [self._tokenizer.encode(text).ids for text in instructions]
        return _pad(instructions, ids, self.max_length, "tokens")

    def _check_ends(self, path: epath.Path, kind: str) -> None:
        tokens = self._tokenizer.encode("").tokens or [""]
        for token, expected, place in zip((tokens[0], tokens[-1]), _ENDS[kind], ("first", "last"), strict=True):
            if expected not in (None, token):
                raise ConfigError(
                    f"text.tokenizer_file {path} does not put {expected} {place}, as that of {kind} does; take the "
                    "tokenizer.json that lies beside the tower's weights."
                )


class SentencePieceTokenizer:
    """A tokenizer of SentencePiece; a text begins with <bos> and ends with a newline, as PaliGemma's prompts do.

    Attributes:
      vocabulary_size: one more than the largest number of a token.
    """

    def __init__(self, path: epath.PathLike, max_length: int):
        """Reads the file.

        Args:
          path: of the .model file.
          max_length: tokens of the longest instruction, <bos> and the newline included.

        Raises:
          ConfigError: the library is not installed, or the file is missing, unreadable or without one of these tokens.
        """
        try:
            # Of an extra, so not at the top.
            import sentencepiece
        except ImportError as error:
            raise _missing_library(path, "sentencepiece", error) from error
        path = _existing(path)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise ConfigError(f"text.tokenizer_file {path} is no .model file of SentencePiece: {error}") from error
        self.max_length = max_length
        self.vocabulary_size = self._processor.vocab_size()
        self._begin, end = self._processor.bos_id(), self._processor.encode("\n")[-1:]
        if self._begin < 0:
            raise ConfigError(f"text.tokenizer_file {path} has no token <bos>, as that of PaliGemma has.")
        if not end or self._processor.id_to_piece(end[0]) not in _NEWLINES:
            raise ConfigError(f"text.tokenizer_file {path} has no token for a newline, as that of PaliGemma has.")
        self._end = end[0]

    def __call__(self, instructions: Sequence[str]) -> np.ndarray:
        """int32 `[n, M]`; raises ConfigError where an instruction is too long."""
        # One by one, since for a batch the library starts threads, as tokenizers does.
        ids = [[self._begin, *self._processor.encode(text), self._end] for text in instructions]
        return _pad(instructions, ids, self.max_length, "tokens")


class InstructionEmbeddings:
    """Embeddings of a dataset's instructions, float32 `[size]` each, looked up as in a dictionary.

    Attributes:
      size: numbers in one embedding.
    """

    def __init__(self, path: epath.PathLike, embeddings: Mapping[str, np.ndarray]):
        """Checks the sizes.

        Args:
          path: of the file, for messages.
          embeddings: by instruction.

        Raises:
          DatasetError: there are none, they differ in size, or one is not finite.
        """
        self._path, self._embeddings = epath.Path(path), dict(embeddings)
        sizes = sorted({len(embedding) for embedding in self._embeddings.values()})
        if len(sizes) != 1 or not sizes[0]:
            found = f"embeddings of sizes {', '.join(map(str, sizes))}" if sizes else "no embeddings"
            raise DatasetError(f"{path} has {found}; all must have one size. {_remedy(self._path.parent)}")
        for instruction, embedding in self._embeddings.items():
            if not np.isfinite(embedding).all():
                raise DatasetError(f"{path}: the embedding of {instruction!r} holds numbers that are not finite.")
        self.size = sizes[0]

    def __getitem__(self, instruction: str) -> np.ndarray:
        """The embedding; raises DatasetError where there is none."""
        if instruction not in self._embeddings:
            raise DatasetError(f"{self._path} has no embedding of {instruction!r}. {_remedy(self._path.parent)}")
        return self._embeddings[instruction]

    def items(self) -> Iterable[tuple[str, np.ndarray]]:
        """All instructions with their embeddings."""
        return self._embeddings.items()

    def __contains__(self, instruction: object) -> bool:
        return instruction in self._embeddings

    def __len__(self) -> int:
        return len(self._embeddings)


def read_embeddings(directory: epath.PathLike) -> InstructionEmbeddings:
    """The embeddings that lie in a dataset directory.

    Raises:
      DatasetError: there are none, or the file is damaged.
    """
    path = epath.Path(directory) / EMBEDDINGS_NAME
    if not path.is_file():
        raise DatasetError(f"{directory} has no {EMBEDDINGS_NAME}. {_remedy(directory)}")
    try:
        with path.open("rb") as file:
            table = pq.read_table(file).select(EMBEDDINGS_SCHEMA.names).cast(EMBEDDINGS_SCHEMA)
    except (pa.ArrowException, KeyError, ValueError) as error:
        columns = ", ".join(f"{field.name}: {field.type}" for field in EMBEDDINGS_SCHEMA)
        raise DatasetError(f"{path} cannot be read; it must be Parquet with {columns} ({error}).") from error
    instructions = table["instruction"].to_pylist()
    vectors = [np.asarray(vector, np.float32) for vector in table["embedding"].to_pylist()]
    embeddings = dict(zip(instructions, vectors, strict=True))
    if len(embeddings) < len(instructions):
        twice = next(text for text in embeddings if instructions.count(text) > 1)
        raise DatasetError(f"{path} has two embeddings of {twice!r}. {_remedy(directory)}")
    return InstructionEmbeddings(path, embeddings)


def write_embeddings(directory: epath.PathLike, embeddings: Mapping[str, np.ndarray]) -> epath.Path:
    """Puts embeddings into a dataset directory, in place of those that it has, and returns the file's path.

    Raises:
      DatasetError: there are none, they differ in size, or one is not finite.
    """
    path = epath.Path(directory) / EMBEDDINGS_NAME
    InstructionEmbeddings(path, embeddings)
    rows = [{"instruction": text, "embedding": np.asarray(vector, np.float32)} for text, vector in embeddings.items()]
    table = pa.Table.from_pylist(rows, schema=EMBEDDINGS_SCHEMA)
    write_atomic(path, lambda file: pq.write_table(table, file))
    return path


def _missing_library(path: epath.PathLike, library: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{path} needs the library {library} ({error}); install it with: pip install 'como_jax[language]'"
    )


def _existing(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    if not path.is_file():
        raise ConfigError(f"text.tokenizer_file {path} does not exist; it comes with the weights that read its tokens.")
    return path


def _pad(instructions: Sequence[str], ids: Sequence[Sequence[int]], max_length: int, unit: str) -> np.ndarray:
    """int32 `[n, max_length]`: numbers of tokens plus one, then zeros."""
    rows = np.zeros((len(ids), max_length), np.int32)
    for row, instruction, numbers in zip(rows, instructions, ids, strict=True):
        if len(numbers) > max_length:
            raise ConfigError(
                f"The instruction {instruction!r} has {len(numbers)} {unit}, more than the {max_length} of "
                f"text.max_length; raise it to at least {len(numbers)}."
            )
        row[: len(numbers)] = np.asarray(numbers, np.int32) + 1
    return rows


def _remedy(directory: epath.PathLike) -> str:
    return (
        f"Make it with: python -m tools.embed_instructions --dataset {directory} --tower clip --weights "
        "model.safetensors --tokenizer tokenizer.json"
    )
