"""The instructions of a dataset's episodes, as a policy's text tower reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from como_jax.data.language import InstructionEmbeddings, read_embeddings
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError
from como_jax.spec.tokenizers import make_tokenizer

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
      rows: one row an episode: token ids, int32 `[E, M]`, or embeddings, float32 `[E, D]`.
    """

    key: str
    rows: np.ndarray

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
        return cls(reader.key, reader(source.instruction))
