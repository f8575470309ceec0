"""The writer that all dataset builders share.

A builder for another source subclasses `EpisodeBuilder` and answers three questions: what the steps hold
(`layout`), where the data lies (`sources`), and which episodes one source has (`episodes`). Everything else
is the same for all: splits, shards, records, episode tables, statistics, the report of what was left out.
"""

import abc
import dataclasses
import functools
import math
import re
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from como_jax.data import schema
from como_jax.data.schema import Episode
from como_jax.errors import ConversionError
from tools.datasets import report
from tools.datasets.sources import Source, assign_splits, group_sources

MIN_STEPS = 2
_DESCRIPTION = "Episodes in the schema of como_jax.data.schema, one record a step."
_MAX_NAMED_FAILURES = 3


class SourceError(Exception):
    """The rest of a source cannot be converted; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """In place of an episode: a part of the source that was left out, while the rest goes on."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Warned:
    """Between episodes: what the user should know; the same text is counted, so keep names out of it."""

    message: str


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """What every step of a dataset holds; the first camera is the one that motion is measured on."""

    cameras: tuple[str, ...] = (schema.DEFAULT_CAMERA,)
    state_size: int | None = None
    action_size: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What can be asked of every builder; each field is a flag of `tools.datasets.build`.

    Attributes:
      image_size: larger pictures are scaled down until their shorter side has this many pixels.
      validation_fraction: share of the sources that becomes the split `val`.
      seed: fixes all that is drawn at random.
    """

    image_size: int = 256
    validation_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ConversionError(f"image_size must be a positive number of pixels, got {self.image_size}")
        if not 0 <= self.validation_fraction < 1:
            raise ConversionError(f"validation_fraction must lie in [0, 1), got {self.validation_fraction}")


def check_control_rate(rate: float) -> None:
    """Raises ConversionError unless the control rate is a positive number of steps per second."""
    if not (math.isfinite(rate) and rate > 0):
        raise ConversionError(f"control_rate must be a positive number of steps per second (Hz), got {rate}")


def dataset_name(out: epath.PathLike) -> str:
    """A valid TFDS dataset name from the last part of a path."""
    name = re.sub(r"\W+", "_", epath.Path(out).name.lower(), flags=re.ASCII).strip("_")
    return name if name[:1].isalpha() else f"dataset_{name}".rstrip("_")


class EpisodeBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Converts sources to a dataset directory; see the module for what a subclass has to add.

    Attributes:
      settings_class: the `Settings` of this builder.
      decoder_errors: what may be raised by a damaged source; it becomes a `SourceError`.
    """

    VERSION = tfds.core.Version("1.0.0")
    settings_class: ClassVar[type[Settings]] = Settings
    decoder_errors: ClassVar[tuple[type[Exception], ...]] = (OSError, ValueError)
    max_sources_per_shard: ClassVar[int] = 64
    max_bytes_per_shard: ClassVar[int] = 2**30

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # TFDS keeps a global registry of classes by name, and nobody looks these up in it.
        super().__init_subclass__(skip_registration=True, **kwargs)

    def __init__(self, out: epath.PathLike, settings: Settings, name: str | None = None):
        """Prepares a conversion; `convert` runs it.

        Args:
          out: directory to be made.
          settings: what to convert and how, an instance of `settings_class`.
          name: of the dataset; derived from `out` by default.

        Raises:
          ConversionError: the name is not valid, or the source cannot be converted as asked.
        """
        out_path = epath.Path(out).expanduser()
        # Only where a name is needed: resolving would make a local path of a bucket's.
        self.out = out_path.resolve() if out_path.name in ("", "..") else out_path
        self.settings = settings
        self.name = dataset_name(self.out) if name is None else name
        if not re.fullmatch(r"[a-zA-Z]\w*", self.name, re.ASCII):
            raise ConversionError(
                f"{self.name!r} is not a valid dataset name: letters, digits and _, starting with a letter"
            )
        self._staging = self.out.with_name(f"{self.out.name}.new-{uuid.uuid4().hex[:8]}")
        self._planned: list[Source] = []
        self._report: dict[str, Any] = {}
        self._progress = tqdm(disable=True)
        self._counts: Counter[str] = Counter()
        super().__init__(file_format="array_record", data_dir=self.out.parent)
        # TFDS rebuilds a copy, in a worker for example, from these arguments.
        self._original_state = {"out": out, "settings": settings, "name": name}

    @property
    @abc.abstractmethod
    def layout(self) -> StepLayout:
        """What the steps hold."""

    @abc.abstractmethod
    def sources(self) -> list[Source]:
        """Everything there is to convert, in a stable order, without reading the data itself."""

    @abc.abstractmethod
    def episodes(self, source: Source) -> Iterator[Episode | LeftOut | Warned]:
        """Yields the episodes of one source; depends on the settings and the source alone.

        Raises:
          SourceError or one of `decoder_errors`: the rest of the source cannot be used.
        """

    def warnings(self) -> list[str]:
        """What the user should know about the conversion as a whole."""
        return []

    def convert(self, overwrite: bool = False, show_progress: bool = False) -> dict[str, Any]:
        """Runs the conversion and returns its report; a failed run leaves nothing behind.

        Args:
          overwrite: replace a dataset that exists already, once the new one is complete.
          show_progress: draw a progress bar on stderr.

        Raises:
          ConversionError: `out` is in the way, or nothing could be converted.
          OSError: the output cannot be written.
        """
        replace = _check_output(self.out, overwrite)
        self._planned = assign_splits(self.sources(), self.settings.validation_fraction, self.settings.seed)
        self._data_dir = str(self._staging if replace else self.out)
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        # A log file should not fill up with progress bars.
        pace = 0.1 if sys.stderr.isatty() else 30
        with (
            tempfile.TemporaryDirectory() as downloads,
            tqdm(
                total=len(self._planned), disable=not show_progress, unit="source", mininterval=pace
            ) as self._progress,
        ):
            self.download_and_prepare(download_dir=downloads, download_config=config)
        if replace:
            old = self.out.with_name(f"{self.out.name}.old-{uuid.uuid4().hex[:8]}")
            self.out.rename(old)
            self._staging.rename(self.out)
            old.rmtree()
            self._data_dir = str(self.out)
        return self._report

    def _info(self) -> tfds.core.DatasetInfo:
        layout = self.layout
        features = schema.step_features(layout.cameras, layout.state_size, layout.action_size)
        metadata = tfds.core.MetadataDict(cameras=list(layout.cameras), builder=type(self).__name__)
        return tfds.core.DatasetInfo(builder=self, description=_DESCRIPTION, features=features, metadata=metadata)

    def _build_data_dir(self, given_data_dir: str | None) -> tuple[str, str]:
        # Not NAME/VERSION below the parent, as TFDS would have it: a source could lie just there.
        return str(self.out.parent), str(self._staging)

    def _log_download_bytes(self) -> None:
        """Keeps TFDS from printing."""

    def _log_download_done(self) -> None:
        """Keeps TFDS from printing."""

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Any]]:
        iterators = {}
        for split in schema.SPLITS:
            members = [source for source in self._planned if source.split == split]
            shards = group_sources(members, self.max_sources_per_shard, self.max_bytes_per_shard)
            if shards:
                iterators[split] = [
                    functools.partial(self._write_shard, self.data_path, split, index, len(shards), shard)
                    for index, shard in enumerate(shards)
                ]
        return iterators

    def _write_shard(
        self, directory: epath.Path, split: str, shard: int, num_shards: int, sources: Sequence[Source]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the step records of one shard for TFDS to write, and writes its episode table and notes."""
        rows, outcomes = [], []
        for source in sources:
            outcome = report.SourceOutcome(source.name)
            for episode in self._sound_episodes(source, outcome):
                for index, example in enumerate(schema.step_examples(episode)):
                    yield f"{episode.episode_id}/{index}", example
                    # TFDS keeps every example of a shard to count them in the end.
                    example.clear()
                rows.append(schema.episode_row(episode))
                outcome.episodes += 1
            outcomes.append(outcome)
            self._show_progress(outcome)
        schema.write_episode_table(directory / schema.episode_table_name(split, shard, num_shards), rows)
        report.write_outcomes(directory, split, shard, outcomes)

    def _show_progress(self, outcome: report.SourceOutcome) -> None:
        self._counts["episodes"] += outcome.episodes
        self._counts["with problems"] += bool(outcome.problems)
        self._progress.set_postfix(self._counts, refresh=False)
        self._progress.update()

    def _sound_episodes(self, source: Source, outcome: report.SourceOutcome) -> Iterator[Episode]:
        """Yields the episodes of a source that can be used, and notes what happened to the others."""
        try:
            for item in self.episodes(source):
                if isinstance(item, LeftOut):
                    outcome.problems.append(item.reason)
                elif isinstance(item, Warned):
                    outcome.warnings.append(item.message)
                elif fault := find_fault(item, self.layout):
                    outcome.problems.append(f"episode {item.episode_id}: {fault}")
                else:
                    yield item
        except (SourceError, *self.decoder_errors) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            outcome.problems.append(reason)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        outcomes = report.collect_outcomes(self.data_path)
        if not any(outcome.episodes for outcome in outcomes):
            raise ConversionError(_nothing_left(outcomes))
        description = {
            "name": self.name,
            "builder": type(self).__name__,
            "settings": dataclasses.asdict(self.settings),
        }
        warnings = [*self.warnings(), *self._drop_empty_splits()]
        self._report = report.write_summary(self.data_path, description, outcomes, warnings)

    def _drop_empty_splits(self) -> list[str]:
        """Removes splits whose sources were all left out, which TFDS writes but refuses to read."""
        splits = self.info.splits.values()
        self.info.set_splits(tfds.core.SplitDict([split for split in splits if split.num_examples]))
        empty = [split.name for split in splits if not split.num_examples]
        for name in empty:
            for pattern in (f"episodes-{name}-*", f"{self.name}-{name}.*"):
                for path in self.data_path.glob(pattern):
                    path.unlink()
        return [f"there is no split {name!r}: all of its sources were left out" for name in empty]


def find_fault(episode: Episode, layout: StepLayout) -> str | None:
    """Says why an episode cannot be used, or None.

    Raises:
      RuntimeError: the builder broke its own promise about what the steps hold.
    """
    if len(episode.steps) < MIN_STEPS:
        return f"has {len(episode.steps)} step(s), and a pair of frames needs {MIN_STEPS}"
    if len(episode.motion) != len(episode.steps) or not episode.control_rate > 0:
        raise RuntimeError(f"motion or control rate of episode {episode.episode_id} is wrong")
    for step in episode.steps:
        if tuple(step.images) != layout.cameras:
            raise RuntimeError(f"episode {episode.episode_id} does not have cameras {layout.cameras}")
    for field, size in (("state", layout.state_size), ("action", layout.action_size)):
        values = [getattr(step, field) for step in episode.steps]
        if size is None:
            continue
        if any(value is None or np.shape(value) != (size,) for value in values):
            return f"not every {field} has {size} numbers"
        if not np.isfinite(np.stack(values)).all():
            return f"some {field} is not finite"
    return None


def _check_output(out: epath.Path, overwrite: bool) -> bool:
    """Makes room for the output; returns whether there is an older dataset to be replaced."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists():
            return False
        if not out.is_dir():
            raise ConversionError(f"{out} exists already and is not a directory")
        if not any(out.iterdir()):
            out.rmdir()
            return False
    except OSError as error:
        raise ConversionError(f"cannot write to {out}: {error.strerror or error}") from error
    if not overwrite:
        raise ConversionError(f"{out} exists already; --overwrite replaces it")
    if not (out / "dataset_info.json").exists():
        raise ConversionError(f"{out} is not a dataset, so --overwrite will not replace it")
    return True


def _nothing_left(outcomes: Sequence[report.SourceOutcome]) -> str:
    named = [
        f"{outcome.source} ({outcome.problems[0] if outcome.problems else 'holds no episode'})"
        for outcome in outcomes[:_MAX_NAMED_FAILURES]
    ]
    more = len(outcomes) - len(named)
    tail = f" and {more} more" if more else ""
    return f"none of the {len(outcomes)} sources could be converted: {', '.join(named)}{tail}"
