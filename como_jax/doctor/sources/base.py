"""What the doctor needs to know of a dataset, and what its formats have in common."""

from __future__ import annotations

import abc
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence

from etils import epath

from como_jax.convert.builder import EpisodeBuilder
from como_jax.convert.report import SourceOutcome
from como_jax.convert.settings import Settings
from como_jax.convert.sources import Source
from como_jax.data.schema import Episode
from como_jax.doctor.findings import Finding, Problem, share_of, warning
from como_jax.doctor.survey import Recording

_NO_MATCH = re.compile(r"(?!)")


class DatasetView(abc.ABC):
    """A dataset that is examined once: first `recordings` to the end, then `findings`.

    Attributes:
      kind: the format, in words.
      unit: what `total` counts.
    """

    kind: str
    unit: str = "episode"

    def __init__(self, directory: epath.Path):
        """Opens the dataset without reading its data."""
        self.directory = directory

    @property
    def name(self) -> str:
        """The name of the dataset."""
        return self.directory.resolve().name

    @property
    @abc.abstractmethod
    def total(self) -> int:
        """The number of units in the dataset."""

    @abc.abstractmethod
    def recordings(self, limit: int) -> Iterator[Recording | Problem]:
        """Yields about `limit` episodes, spread evenly over the dataset, and what could not be read; 0 for all."""

    def facts(self) -> dict[str, str]:
        """Returns what is known of the dataset besides its episodes."""
        return {}

    def findings(self) -> list[Finding]:
        """Returns faults of the format itself, as far as the recordings that were read show them."""
        return []


class SourceReader:
    """Reads the episodes of a dataset builder's sources, and counts what the builder warns of."""

    def __init__(self, builder: type[EpisodeBuilder], settings: Settings, covered: re.Pattern[str] = _NO_MATCH):
        """Makes the builder, which writes nothing; `covered` matches the warnings that a check of the doctor covers."""
        self.builder = builder(epath.Path(tempfile.gettempdir()) / "como_doctor", settings)
        self._covered = covered
        self._warnings: Counter[str] = Counter()
        self._num_sources = 0

    def read(self, source: Source) -> Iterator[Episode | Problem]:
        """Yields the episodes of one source, and then what could not be read of it."""
        self._num_sources += 1
        outcome = SourceOutcome(source.name)
        try:
            for episode in self.builder.read(source, outcome):
                if episode.steps:
                    yield episode
                else:
                    outcome.problems.append(f"episode {episode.episode_id} has no steps")
        finally:
            # Also if the rest of the source is not read.
            self._warnings.update(message for message in set(outcome.warnings) if not self._covered.search(message))
        for reason in outcome.problems:
            yield Problem(source.name, reason)

    def findings(self) -> list[Finding]:
        """Returns what the builder has warned of."""
        return [
            warning(
                "conversion-warning",
                f"A conversion warns for {share_of(count, self._num_sources, 'source')}: {message}.",
                "It does as it says; nothing needs to be done if that is right.",
            )
            for message, count in sorted(self._warnings.items())
        ]


def spread(total: int, limit: int) -> list[int]:
    """Returns up to `limit` of the numbers below `total`, evenly spread; all of them if the limit is 0."""
    if not limit or limit >= total:
        return list(range(total))
    return [index * total // limit for index in range(limit)]


def spread_records(sources: Sequence[Source], limit: int, blocks_per_source: int = 4) -> list[Source]:
    """Returns parts of sources that have `limit` records together.

    They form a few blocks, evenly spread, because a file of records without an index is read from its start.
    """
    lengths = [source.records[1] - source.records[0] for source in sources if source.records]
    total = sum(lengths)
    if not limit or limit >= total:
        return list(sources)
    blocks = min(limit, blocks_per_source * len(sources))
    chosen = bytearray(total)
    for block in range(blocks):
        begin, count = block * total // blocks, limit * (block + 1) // blocks - limit * block // blocks
        chosen[begin : begin + count] = b"\x01" * count
    parts, offset = [], 0
    for source, length in zip(sources, lengths, strict=True):
        assert source.records is not None
        for run in re.finditer(b"\x01+", bytes(chosen[offset : offset + length])):
            begin, end = (source.records[0] + position for position in run.span())
            parts.append(Source(source.path, source.split, (begin, end)))
        offset += length
    return parts
