"""The base of all dataset builders.

A builder for another source subclasses `EpisodeBuilder` and answers three questions: what the steps hold
(`layout`), where the data lies (`sources`), and which episodes one source has (`episodes`). Everything else
is the same for all: splits, shards, records, episode tables, statistics, and the report of what was left out.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from como_jax.convert import report
from como_jax.convert.report import Progress, SourceOutcome
from como_jax.convert.runners import Runner, run_here
from como_jax.convert.settings import Settings
from como_jax.convert.shards import OnSource, ShardExamples, ShardNotes, ShardWriter, table_of_shard
from como_jax.convert.sources import Shard, Source, assign_splits, make_shards
from como_jax.data import schema
from como_jax.data.episode_table import ShardSizes, read_part, share_groups, table_name, write_episode_table
from como_jax.data.schema import Episode
from como_jax.errors import ConversionError, one_line
from como_jax.names import DEFAULT_CAMERA
from como_jax.staging import Staging, check_apart, check_output, make_parent, real_output

MIN_STEPS = 2
_DESCRIPTION = "Episodes in the schema of como_jax.data.schema, one record a step."
_MAX_NAMED_FAILURES = 3
# Increase it when the same plan would give other files, so that no conversion goes on with those of an older version.
_FORMAT = 2


class SourceError(Exception):
    """The rest of a source cannot be converted; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Yielded in place of an episode: a part of the source was left out, and the rest goes on."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Warned:
    """Yielded between episodes: what the user should know.

    Equal messages of several sources are counted together, so keep names out of the message.
    """

    message: str


Item = Episode | LeftOut | Warned


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """What every step of a dataset holds; motion is measured on the first camera."""

    cameras: tuple[str, ...] = (DEFAULT_CAMERA,)
    state_size: int | None = None
    action_size: int | None = None


def dataset_name(out: epath.PathLike) -> str:
    """Makes a valid TFDS dataset name from the last part of a path."""
    name = re.sub(r"\W+", "_", epath.Path(out).name.lower(), flags=re.ASCII).strip("_")
    return name if name[:1].isalpha() else f"dataset_{name}".rstrip("_")


class EpisodeBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Converts sources to a dataset directory; see the module for what a subclass has to add.

    Attributes:
      settings_class: the `Settings` of this builder.
      decoder_errors: what reading a damaged source may raise; it is treated like a `SourceError`.
      max_bytes_per_shard: of sources; a shard is closed before it would exceed them.
      lost: sources at which processes have died, and how, which are left out.
    """

    VERSION = tfds.core.Version("1.0.0")
    settings_class: ClassVar[type[Settings]] = Settings
    decoder_errors: ClassVar[tuple[type[Exception], ...]] = (OSError, ValueError)
    max_bytes_per_shard: ClassVar[int] = 2**30

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # TFDS keeps a global registry of classes by name, which is not needed here.
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
        self.out = real_output(out)
        self.settings = settings
        self.lost: dict[str, str] = {}
        self.name = dataset_name(self.out) if name is None else name
        if not re.fullmatch(r"[a-zA-Z]\w*", self.name, re.ASCII):
            raise ConversionError(
                f"{self.name!r} is not a valid dataset name: letters, digits and _, starting with a letter"
            )
        self.staging = Staging(self.out, "conversion")
        super().__init__(file_format="array_record", data_dir=self.out.parent)
        self._data_dir = str(self.staging.dataset)
        # TFDS makes a copy of the builder, in a worker for example, from these arguments.
        self._original_state = {"out": out, "settings": settings, "name": name}

    @property
    @abc.abstractmethod
    def layout(self) -> StepLayout:
        """The cameras of the steps, and the sizes of their states and actions."""

    @property
    def environment(self) -> dict[str, str]:
        """Family and settings of the environment that looks like this dataset, as in `--env_setting`; {} for none."""
        return {}

    @abc.abstractmethod
    def sources(self) -> list[Source]:
        """Returns everything there is to convert, in a stable order, without reading the data itself."""

    @abc.abstractmethod
    def episodes(self, source: Source) -> Iterator[Item]:
        """Yields the episodes of one source; may depend on nothing but the settings and the source.

        Raises:
          SourceError or one of `decoder_errors`: the rest of the source cannot be used.
        """

    def warnings(self) -> list[str]:
        """Returns what the user should know about the conversion as a whole."""
        return []

    def label_files(self) -> list[str]:
        """Returns the files or fields that look as if they held instructions, whether they were read or not."""
        return []

    def convert(
        self, overwrite: bool = False, show_progress: bool = False, restart: bool = False, runner: Runner = run_here
    ) -> dict[str, Any]:
        """Runs the conversion, or goes on with one that was stopped, and returns its report.

        A failed run keeps its finished shards in the staging folder. If there are none, it leaves nothing.

        Args:
          overwrite: replace a dataset that exists already, once the new one is complete.
          show_progress: draw a progress bar on stderr.
          restart: discard what a stopped conversion has left.
          runner: writes the shards.

        Raises:
          OutputError: `out` exists already, or another conversion into it runs or was stopped.
          ConversionError: nothing could be converted.
          OSError: the output cannot be written.
        """
        check_apart(self.out, getattr(self.settings, "source", None))
        sources = assign_splits(self.sources(), self.settings.validation_fraction, self.settings.seed)
        shards = make_shards(sources, schema.SPLITS, self.max_bytes_per_shard)
        plan = self._plan(shards)
        make_parent(self.out)
        with self.staging.locked():
            if not restart and self.staging.is_published(plan):
                self.staging.tidy()
                return json.loads((self.out / report.REPORT_NAME).read_text())
            check_output(self.out, overwrite)
            self.staging.open(plan, restart)
            self._write_shards(shards, runner, show_progress)
            result = self._finish(shards)
            self.staging.publish(overwrite)
        self._data_dir = str(self.out)
        self.info.update_data_dir(self._data_dir)
        return result

    def download_and_prepare(self) -> None:
        """Converts, under the name that this has in TFDS."""
        self.convert()

    def shard_writer(self) -> ShardWriter:
        """Returns a writer of shards into the staging folder."""
        return ShardWriter(self.info.features, self.staging)

    def shard_examples(self, shard: Shard, on_source: OnSource | None = None) -> ShardExamples:
        """Returns the records of a shard; `on_source` is called when a source is done."""
        return ShardExamples(shard, self._usable_episodes, on_source)

    def records_path(self, shard: Shard) -> epath.Path:
        """Returns the file of a shard's records in the staging folder."""
        return self._get_filename_template(shard.split).sharded_filepath(
            shard_index=shard.index, num_shards=shard.count
        )

    def write_shard(self, shard: Shard, on_source: OnSource) -> None:
        """Writes one shard in this process."""
        self.shard_writer().write(self.shard_examples(shard, on_source), self.records_path(shard))

    def _plan(self, shards: Sequence[Shard]) -> dict[str, Any]:
        """Returns everything that decides what is in the shards, by which one conversion differs from another."""
        listing = json.dumps([dataclasses.asdict(shard) for shard in shards])
        return {
            "format": _FORMAT,
            "builder": f"{type(self).__module__}.{type(self).__qualname__}",
            "version": str(self.version),
            "name": self.name,
            "layout": dataclasses.asdict(self.layout),
            "settings": dataclasses.asdict(self.settings),
            "sources": {
                "number of sources": sum(len(shard.sources) for shard in shards),
                "names, sizes or splits of sources": hashlib.blake2b(listing.encode(), digest_size=16).hexdigest(),
            },
        }

    def _write_shards(self, shards: Sequence[Shard], runner: Runner, show_progress: bool) -> None:
        finished = self.staging.finished([shard.name for shard in shards])
        pending = [shard for shard in shards if shard.name not in finished]
        done = [outcome for shard in shards if shard.name in finished for outcome in self._notes(shard).outcomes]
        try:
            with Progress(sum(len(shard.sources) for shard in shards), done, show_progress) as progress:
                runner(self, pending, progress)
            # Removes what processes that died have left half-written.
            self.staging.finished([shard.name for shard in shards])
        except BaseException as error:
            num_finished = sum(self.staging.read_notes(shard.name) is not None for shard in shards)
            if num_finished:
                error.add_note(
                    f"{num_finished} of {len(shards)} shards are finished and kept in {self.staging.folder}; "
                    "the same command goes on from there"
                )
            else:
                self.staging.discard()
            raise

    def _finish(self, shards: Sequence[Shard]) -> dict[str, Any]:
        """Writes everything that describes the shards as a whole, and returns the report."""
        notes = {shard: self._notes(shard) for shard in shards}
        outcomes = sorted((outcome for each in notes.values() for outcome in each.outcomes), key=lambda o: o.source)
        if not any(outcome.episodes for outcome in outcomes):
            self.staging.discard()
            raise ConversionError(_nothing_left(outcomes))
        warnings = [*self.warnings()]
        splits = []
        for split in dict.fromkeys(shard.split for shard in shards):
            members = {shard: each for shard, each in notes.items() if shard.split == split}
            if any(each.num_records for each in members.values()):
                splits.append(self._split_info(split, list(members.values())))
                self._write_table(split, members)
            else:
                # TFDS refuses to read a split without records.
                for shard in members:
                    self.records_path(shard).unlink(missing_ok=True)
                warnings.append(f"there is no split {split!r}: all of its sources were left out")
        self.info.set_splits(tfds.core.SplitDict(splits))
        self.info.write_to_directory(self.data_path)
        description = {
            "name": self.name,
            "builder": type(self).__name__,
            "settings": dataclasses.asdict(self.settings),
        }
        return report.write_summary(self.data_path, description, outcomes, warnings, self.label_files())

    def _write_table(self, split: str, notes: Mapping[Shard, ShardNotes]) -> None:
        """Joins the episodes of all shards of a split to its episode table."""
        records, sizes = [each.num_records for each in notes.values()], [each.num_bytes for each in notes.values()]
        write_episode_table(
            self.staging.dataset / table_name(split),
            (read_part(table_of_shard(self.staging, shard)) for shard in notes),
            ShardSizes(np.array(records), np.array(sizes)),
            share_groups(len(notes)),
        )

    def _notes(self, shard: Shard) -> ShardNotes:
        notes = ShardNotes.read(self.staging, shard)
        if notes is None:
            raise ConversionError(f"shard {shard.name} is not in {self.staging.folder}: can all workers reach it?")
        return notes

    def _split_info(self, split: str, notes: Sequence[ShardNotes]) -> tfds.core.SplitInfo:
        return tfds.core.SplitInfo(
            name=split,
            shard_lengths=[each.num_records for each in notes],
            num_bytes=sum(each.num_bytes for each in notes),
            filename_template=self._get_filename_template(split),
        )

    def _info(self) -> tfds.core.DatasetInfo:
        layout = self.layout
        features = schema.step_features(layout.cameras, layout.state_size, layout.action_size)
        metadata = tfds.core.MetadataDict(
            cameras=list(layout.cameras), builder=type(self).__name__, environment=self.environment
        )
        return tfds.core.DatasetInfo(builder=self, description=_DESCRIPTION, features=features, metadata=metadata)

    def _build_data_dir(self, given_data_dir: str | None) -> tuple[str, str]:
        # Not NAME/VERSION below the parent, as TFDS would have it: a source could lie just there. And not the folder
        # of the shards, where TFDS would read what a run that was killed has left.
        return str(self.out.parent), str(self.staging.folder)

    def _shard_iterators_per_split(self, dl_manager: Any) -> NoReturn:
        # TFDS would write all shards at once, and their records alone.
        raise NotImplementedError("call convert")

    def read(self, source: Source, outcome: SourceOutcome) -> Iterator[Episode]:
        """Yields the episodes of a source, and notes in `outcome` what was left out and what the user should know.

        Every fault of a source becomes an entry of the report here.
        """
        if source.name in self.lost:
            outcome.problems.append(self.lost[source.name])
            return
        try:
            for item in self.episodes(source):
                if isinstance(item, LeftOut):
                    outcome.problems.append(item.reason)
                elif isinstance(item, Warned):
                    outcome.warnings.append(item.message)
                else:
                    outcome.warnings += [note for note in item.notes if note not in outcome.warnings]
                    yield item
        except (SourceError, *self.decoder_errors) as error:
            outcome.problems.append(one_line(error))

    def _usable_episodes(self, source: Source, outcome: SourceOutcome) -> Iterator[Episode]:
        """Yields the episodes of a source that fit the layout; the others are noted like all that is left out."""
        for episode in self.read(source, outcome):
            if fault := find_fault(episode, self.layout):
                outcome.problems.append(f"episode {episode.episode_id}: {fault}")
            else:
                yield episode


def find_fault(episode: Episode, layout: StepLayout) -> str | None:
    """Returns why an episode cannot be used, or None.

    Raises:
      RuntimeError: the steps are not what the builder's own layout says.
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


def _nothing_left(outcomes: Sequence[report.SourceOutcome]) -> str:
    named = [
        f"{outcome.source} ({outcome.problems[0] if outcome.problems else 'holds no episode'})"
        for outcome in outcomes[:_MAX_NAMED_FAILURES]
    ]
    more = len(outcomes) - len(named)
    tail = f" and {more} more" if more else ""
    return f"none of the {len(outcomes)} sources could be converted: {', '.join(named)}{tail}"
