"""The instructions of a dataset's episodes, as a policy's text tower reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from como_jax.data.language import InstructionEmbeddings, make_tokenizer, read_embeddings
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError

MISSING = ("refuse", "empty")
"""What to do with episodes without instruction: refuse the dataset, or let the policy read an empty one."""

_GAP = "{}"


class InstructionReader:
    """Instructions as a text tower reads them; each is read once.

    Attributes:
      key: the field of `Observation` that gets them.
    """

    def __init__(self, key: str, read: Callable[[str], np.ndarray]):
        """Takes the field, and what makes a row of an instruction."""
        self.key, self._read = key, read
        self._known: dict[str, np.ndarray] = {}

    @classmethod
    def make(cls, text: ConfigDict, directory: epath.PathLike) -> InstructionReader:
        """Of the `text` section of a policy's config; embeddings are those that lie in a directory.

        Every instruction is put into `text.prompt` before it is read, but where embeddings were made beforehand.

        Raises:
          ConfigError: an unknown tower, a tokenizer that cannot be read, or a prompt without room for an instruction.
          DatasetError: embeddings are wanted, and the directory has none.
        """
        if text.tower == "embedding":
            return cls.of_embeddings(read_embeddings(directory))
        # Runs of before there were prompts have none in their config.
        prompt = text.get("prompt", _GAP)
        if prompt.count(_GAP) != 1:
            raise ConfigError(f"text.prompt {prompt!r} must have {_GAP} once, where the instruction is put.")
        tokenizer = make_tokenizer(text.tower, text.max_length, text.tokenizer_file)
        return cls("text", lambda instruction: tokenizer([prompt.replace(_GAP, instruction)])[0])

    @classmethod
    def of_embeddings(cls, embeddings: Mapping[str, np.ndarray] | InstructionEmbeddings) -> InstructionReader:
        """Of embeddings by instruction."""
        return cls("text_embedding", lambda instruction: np.asarray(embeddings[instruction], np.float32))

    def __call__(self, instructions: Sequence[str]) -> np.ndarray:
        """Token ids, int32 `[n, M]`, or embeddings, float32 `[n, E]`."""
        for instruction in dict.fromkeys(instructions):
            if instruction not in self._known:
                self._known[instruction] = self._read(instruction)
        return np.stack([self._known[instruction] for instruction in instructions])


@dataclasses.dataclass(frozen=True)
class InstructionTable:
    """One row an episode: token ids, int32 `[E, M]`, or embeddings, float32 `[E, D]`.

    Attributes:
      key: the field of `Observation` that the rows belong to.
      rows: what it gets.
    """

    key: str
    rows: np.ndarray

    @classmethod
    def read(cls, source: EpisodeSource, reader: InstructionReader, missing: str = "refuse") -> InstructionTable:
        """The table of a dataset.

        Args:
          source: its episodes.
          reader: of their instructions.
          missing: one of `MISSING`.

        Raises:
          DatasetError: an episode has no instruction, or an instruction no embedding.
          ConfigError: an instruction is too long.
        """
        if missing not in MISSING:
            raise ConfigError(f"data.missing_instructions {missing!r} must be one of {', '.join(MISSING)}.")
        empty = [name for name, text in zip(source.episode_id, source.instruction, strict=True) if not text.strip()]
        if empty and missing == "refuse":
            raise DatasetError(
                f"{source.directory} ({source.split}): {len(empty)} of {len(source.instruction)} episodes have no "
                f"instruction, the first is {empty[0]!r}. Train on them all the same with "
                "--config.data.missing_instructions=empty."
            )
        return cls(reader.key, reader(source.instruction))
