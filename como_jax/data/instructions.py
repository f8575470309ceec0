"""The instructions of episodes as a policy's text tower reads them: token ids, or precomputed embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from ml_collections import ConfigDict

from como_jax.data.parquet import read_parquet
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError
from como_jax.files import write_atomic
from como_jax.spec.tokenizers import make_tokenizer

EMBEDDINGS_NAME = "instruction_embeddings.parquet"
EMBEDDINGS_SCHEMA = pa.schema(
    [
        pa.field("instruction", pa.string(), nullable=False),
        pa.field("embedding", pa.list_(pa.float32()), nullable=False),
    ]
)

MISSING = ("refuse", "empty")
"""What happens to episodes without an instruction: the dataset is refused, or the policy reads an empty text."""

_GAP = "{}"


class InstructionReader:
    """Turns instructions into the numbers that a text tower reads; the same instruction is converted once.

    Attributes:
      key: the field of `Observation` that holds the numbers.
    """

    def __init__(self, key: str, read: Callable[[str], np.ndarray]):
        """A reader for the field `key`, where `read` makes one row of an instruction."""
        self.key, self._read = key, read
        self._known: dict[str, np.ndarray] = {}

    @classmethod
    def make(cls, text: ConfigDict, directory: epath.PathLike) -> InstructionReader:
        """The reader that a policy's config asks for.

        Every instruction is put into `text.prompt` before it is tokenised. Precomputed embeddings know no prompt.

        Args:
          text: the config's section `text`.
          directory: of the dataset or run whose precomputed embeddings are read, where the tower is "embedding".

        Raises:
          ConfigError: an unknown tower, a tokenizer that cannot be read, or a prompt without room for an instruction.
          DatasetError: the directory has no embeddings, or damaged ones.
        """
        if text.tower == "embedding":
            return cls.of_embeddings(read_embeddings(directory))
        # Older runs have no prompt in their config.
        prompt = text.get("prompt", _GAP)
        if prompt.count(_GAP) != 1:
            raise ConfigError(f"text.prompt {prompt!r} must contain {_GAP} once, in the place of the instruction.")
        file = epath.Path(text.tokenizer_file) if text.tokenizer_file else ""
        tokenizer = make_tokenizer(text.tower, text.max_length, file)
        return cls("text", lambda instruction: tokenizer([prompt.replace(_GAP, instruction)])[0])

    @classmethod
    def of_embeddings(cls, embeddings: Mapping[str, np.ndarray] | InstructionEmbeddings) -> InstructionReader:
        """A reader of precomputed embeddings, by instruction."""
        return cls("text_embedding", lambda instruction: np.asarray(embeddings[instruction], np.float32))

    def __call__(self, instructions: Sequence[str]) -> np.ndarray:
        """Token ids, int32 `[n, M]`, or embeddings, float32 `[n, E]`."""
        for instruction in dict.fromkeys(instructions):
            if instruction not in self._known:
                self._known[instruction] = self._read(instruction)
        return np.stack([self._known[instruction] for instruction in instructions])


@dataclasses.dataclass(frozen=True)
class InstructionTable:
    """The instructions of all episodes of a dataset, as numbers.

    Attributes:
      key: the field of `Observation` that holds them.
      rows: one row a text, of the episodes in order: token ids, int32 `[T, M]`, or embeddings, float32 `[T, D]`.
      first: int64 `[E + 1]`, the row of every episode's first text; the last number is T.
    """

    key: str
    rows: np.ndarray
    first: np.ndarray

    @classmethod
    def read(cls, source: EpisodeSource, reader: InstructionReader, missing: str = "refuse") -> InstructionTable:
        """Converts the instructions of a dataset.

        Args:
          source: the dataset.
          reader: converts instructions.
          missing: what happens to episodes without an instruction, one of `MISSING`.

        Raises:
          DatasetError: an episode has no instruction, or an instruction has no embedding.
          ConfigError: an instruction is too long, or `missing` is unknown.
        """
        if missing not in MISSING:
            raise ConfigError(f"data.missing_instructions {missing!r} must be one of {', '.join(MISSING)}.")
        empty = [name for name, text in zip(source.episode_id, source.instruction, strict=True) if not text.strip()]
        if empty and missing == "refuse":
            raise DatasetError(
                f"{source.directory} ({source.split}): {len(empty)} of {len(source.instruction)} episodes have no "
                f"instruction, the first is {empty[0]!r}. To train on them all the same, set "
                'data.missing_instructions to "empty".'
            )
        texts = [[first, *others] for first, others in zip(source.instruction, source.other_instructions, strict=True)]
        first = np.cumsum([0, *map(len, texts)])
        return cls(reader.key, reader([text for each in texts for text in each]), first)

    @property
    def has_choice(self) -> bool:
        """Whether any episode has several texts."""
        return len(self.rows) > len(self.first) - 1

    def choose(self, episodes: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """The rows of one text for each of the episodes `[B]`; draws, float `[B]` in [0, 1), choose among several."""
        first = self.first[episodes]
        count = self.first[episodes + 1] - first
        return self.rows[first + (draws * count).astype(np.int64)]


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
        table = read_parquet(path).select(EMBEDDINGS_SCHEMA.names).cast(EMBEDDINGS_SCHEMA)
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


def _remedy(directory: epath.PathLike) -> str:
    return (
        f"Make it with: python -m tools.embed_instructions --dataset {directory} --tower clip --weights "
        "model.safetensors --tokenizer tokenizer.json"
    )
