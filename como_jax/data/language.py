"""Instructions as numbers: token ids for a text tower, or precomputed embeddings.

A tokenizer maps n instructions to int32 `[n, M]`, where M is the maximum length. Every entry is the id of a token plus
one, or 0 after the end of the text.
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


def make_tokenizer(tower: str, max_length: int, file: epath.PathLike = "") -> Tokenizer:
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
    if tower == "tokens" and epath.Path(file).suffix == ".model":
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

    def __init__(self, path: epath.PathLike, max_length: int, kind: str):
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

    def _check_ends(self, path: epath.Path, kind: str) -> None:
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

    def __init__(self, path: epath.PathLike, max_length: int):
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


class InstructionEmbeddings:
    """Precomputed embeddings of instructions, float32 `[size]` each, looked up as in a dictionary.

    Attributes:
      size: numbers in one embedding.
    """

    def __init__(self, path: epath.PathLike, embeddings: Mapping[str, np.ndarray]):
        """Checks the embeddings.

        Args:
          path: path of the file, which messages name.
          embeddings: embeddings by instruction.

        Raises:
          DatasetError: there are no embeddings, they differ in size, or one is not finite.
        """
        self._path, self._embeddings = epath.Path(path), dict(embeddings)
        sizes = sorted({len(embedding) for embedding in self._embeddings.values()})
        if len(sizes) != 1 or not sizes[0]:
            found = f"embeddings of sizes {', '.join(map(str, sizes))}" if sizes else "no embeddings"
            raise DatasetError(f"{path} has {found}; all must have the same size. {_remedy(self._path.parent)}")
        for instruction, embedding in self._embeddings.items():
            if not np.isfinite(embedding).all():
                raise DatasetError(
                    f"{path}: the embedding of {instruction!r} holds numbers that are not finite. "
                    f"{_remedy(self._path.parent)}"
                )
        self.size = sizes[0]

    def __getitem__(self, instruction: str) -> np.ndarray:
        """The embedding of an instruction; raises DatasetError if there is none."""
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
    """Reads the embeddings that lie in the directory of a dataset or a run.

    Raises:
      DatasetError: the file is missing or damaged.
    """
    path = epath.Path(directory) / EMBEDDINGS_NAME
    if not path.is_file():
        raise DatasetError(f"{directory} has no {EMBEDDINGS_NAME}. {_remedy(directory)}")
    try:
        with path.open("rb") as file:
            table = pq.read_table(file).select(EMBEDDINGS_SCHEMA.names).cast(EMBEDDINGS_SCHEMA)
    except (pa.ArrowException, KeyError, ValueError) as error:
        columns = ", ".join(f"{field.name}: {field.type}" for field in EMBEDDINGS_SCHEMA)
        raise DatasetError(
            f"{path} cannot be read; it must be Parquet with {columns} ({error}). {_remedy(directory)}"
        ) from error
    instructions = table["instruction"].to_pylist()
    vectors = [np.asarray(vector, np.float32) for vector in table["embedding"].to_pylist()]
    embeddings = dict(zip(instructions, vectors, strict=True))
    if len(embeddings) < len(instructions):
        twice = next(text for text in embeddings if instructions.count(text) > 1)
        raise DatasetError(f"{path} has two embeddings of {twice!r}. {_remedy(directory)}")
    return InstructionEmbeddings(path, embeddings)


def write_embeddings(directory: epath.PathLike, embeddings: Mapping[str, np.ndarray]) -> epath.Path:
    """Writes embeddings into a directory, replaces the ones there, and returns the file's path.

    Raises:
      DatasetError: there are no embeddings, they differ in size, or one is not finite.
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


def _remedy(directory: epath.PathLike) -> str:
    return (
        f"Make it with: python -m tools.embed_instructions --dataset {directory} --tower clip --weights "
        "model.safetensors --tokenizer tokenizer.json"
    )
