"""What the doctor needs of a dataset, and what its formats have in common."""

from __future__ import annotations

import abc
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence

from etils import epath

from como_jax.convert.builder import EpisodeBuilder, LeftOut, Settings, SourceError, Warned
from como_jax.convert.sources import Source
from como_jax.data.schema import Episode
from como_jax.doctor.findings import Finding, Problem, Severity, share_of
from como_jax.doctor.recording import Recording

_NO_MATCH = re.compile(r"(?!)")


class DatasetView(abc.ABC):
    """A dataset to be looked over once: first `recordings` to the end, then `findings`.

    Attributes:
      kind: of dataset, for people.
      unit: what `total` counts.
    """

    kind: str
    unit: str = "episode"

    def __init__(self, directory: epath.Path):
        """Opens the dataset without reading its data."""
        self.directory = directory

    @property
    def name(self) -> str:
        """Of the dataset."""
        return self.directory.resolve().name

    @property
    @abc.abstractmethod
    def total(self) -> int:
        """Number of units that there are."""

    @abc.abstractmethod
    def recordings(self, limit: int) -> Iterator[Recording | Problem]:
        """Episodes that are spread evenly over the dataset, and what could not be read.

        Args:
          limit: about how many; 0 for all.
        """

    def facts(self) -> dict[str, str]:
        """What is known of the dataset beside its episodes."""
        return {}

    def findings(self) -> list[Finding]:
        """Faults of the format itself, as far as the recordings that were read show them."""
        return []


class SourceReader:
    """The episodes of a dataset builder's sources, with everything counted that goes wrong."""

    def __init__(self, builder: type[EpisodeBuilder], settings: Settings, covered: re.Pattern[str] = _NO_MATCH):
        """Makes the builder, which writes nothing.

        Args:
          builder: class of the builder.
          settings: of the builder.
          covered: matches the warnings that a check of the doctor gives better.
        """
        self.builder = builder(epath.Path(tempfile.gettempdir()) / "como_doctor", settings)
        self._covered = covered
        self._warnings: Counter[str] = Counter()
        self._num_sources = 0

    def read(self, source: Source) -> Iterator[Episode | Problem]:
        """The episodes of one source."""
        self._num_sources += 1
        warned: set[str] = set()
        try:
            for item in self.builder.episodes(source):
                if isinstance(item, Warned):
                    warned.add(item.message)
                elif isinstance(item, LeftOut):
                    yield Problem(source.name, item.reason)
                elif not item.steps:
                    yield Problem(source.name, f"episode {item.episode_id} has no steps")
                else:
                    yield item
        except (SourceError, *self.builder.decoder_errors) as error:
            yield Problem(source.name, " ".join(str(error).split()) or type(error).__name__)
        finally:
            # Also when the rest of the source is not wanted.
            self._warnings.update(message for message in warned if not self._covered.search(message))

    def findings(self) -> list[Finding]:
        """What the builder warned of."""
        return [
            Finding(
                Severity.WARNING,
                "conversion-warning",
                f"A conversion warns for {share_of(count, self._num_sources, 'source')}: {message}.",
                "It does as it says; nothing needs to be done if that is right.",
            )
            for message, count in sorted(self._warnings.items())
        ]


def spread(total: int, limit: int) -> list[int]:
    """Up to `limit` of the numbers below `total`, evenly spread; all of them if the limit is 0."""
    if not limit or limit >= total:
        return list(range(total))
    return [index * total // limit for index in range(limit)]


def spread_records(sources: Sequence[Source], limit: int, blocks_per_source: int = 4) -> list[Source]:
    """Parts of sources that have `limit` records together.

    They come in few blocks, evenly spread, because a file of records that has no index is read from its start.
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
