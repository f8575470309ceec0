"""Precomputed embeddings of the instructions of a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from como_jax.errors import DatasetError
from como_jax.files import write_atomic

EMBEDDINGS_NAME = "instruction_embeddings.parquet"
EMBEDDINGS_SCHEMA = pa.schema(
    [
        pa.field("instruction", pa.string(), nullable=False),
        pa.field("embedding", pa.list_(pa.float32()), nullable=False),
    ]
)


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


def _remedy(directory: epath.PathLike) -> str:
    return (
        f"Make it with: python -m tools.embed_instructions --dataset {directory} --tower clip --weights "
        "model.safetensors --tokenizer tokenizer.json"
    )
