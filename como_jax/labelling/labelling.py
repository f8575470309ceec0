"""Labels a dataset with latent motion, shard by shard, on all hosts of a job; goes on after a kill."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, Mesh

from como_jax import hosts
from como_jax.data.clips import ClipConfig, ClipIndex, gap_steps
from como_jax.data.frames import FrameReader
from como_jax.data.label_info import LABELS_NAME
from como_jax.data.mixture import Mixture, MixtureEntry, MixturePart
from como_jax.data.schema import SPLITS
from como_jax.data.sources import EpisodeSource
from como_jax.errors import DatasetError, OutputError
from como_jax.files import write_json
from como_jax.labelling.provenance import LabelSettings, describe, hash_params
from como_jax.labelling.shards import (
    LabelShard,
    latent_statistics,
    list_shards,
    write_flat_table,
    write_labelled_table,
)
from como_jax.labelling.streaming import StepLabels, StreamLabeller, steps_back
from como_jax.staging import Staging, check_output, is_local, make_parent
from como_jax.training import sharding
from como_jax.training.run import Run

REPORT_NAME, FLAT_NAME = "labelling_report.json", "latents.parquet"
_COPIED = ("dataset_info.json", "features.json", "metadata.json", "conversion_report.json")

Describe = Callable[[epath.Path, list[LabelShard]], dict[str, Any]]
Progress = Callable[[LabelShard, dict[str, Any]], None]


class DatasetLabeller:
    """One dataset, one run, and where the labels go."""

    def __init__(self, run: Run, directory: epath.PathLike, out: epath.PathLike, settings: LabelSettings, threads: int):
        """Opens the dataset; `label` does the work.

        Raises:
          DatasetError: the directory holds no dataset, or not the camera.
        """
        self._directory, self._out = epath.Path(directory), epath.Path(out)
        self._settings, self._run, self._threads = settings, run, threads
        self.shards = list_shards(self._directory)
        self._sources = {
            split: EpisodeSource(self._directory, split, settings.camera)
            for split in SPLITS
            if any(shard.split == split for shard in self.shards)
        }
        self.staging = Staging(self._out, "labelling")

    def label(
        self, *, overwrite: bool = False, restart: bool = False, progress: Progress, summarize: Describe
    ) -> dict[str, Any]:
        """Labels everything, or goes on with what an earlier run of the same labelling has left.

        All hosts of a job call it; each labels every so many shards, and the first finishes the dataset.

        Args:
          overwrite: replace a dataset that is in the way.
          restart: discard what a stopped labelling left.
          progress: is told of every shard that this host finished.
          summarize: adds to the report what it makes of the labelled shards, on the first host.

        Returns:
          The report.

        Raises:
          OutputError: `out` is in the way, or another labelling into it runs or was stopped.
          DatasetError: no picture of a shard can be read.
        """
        _check_outside(self._out, self._directory)
        params, is_first = _on_this_host(self._run.params), hosts.is_first()
        plan = describe(self._run, hash_params(params), str(self._directory), self.shards, self._settings)
        with contextlib.ExitStack() as lock:
            with hosts.in_step(OutputError):
                if is_first:
                    make_parent(self._out)
                    lock.enter_context(self.staging.locked())
                    self._open(plan, overwrite, restart)
            with self._noting_what_is_kept(), hosts.in_step(OutputError):
                # There is none if all that an earlier run had left to do was to tidy up.
                if self.staging.dataset.exists():
                    self._label_own(params, progress)
            with self._noting_what_is_kept(), hosts.in_step(OutputError):
                return self._complete(plan, overwrite, summarize) if is_first else {}

    def _open(self, plan: dict[str, Any], overwrite: bool, restart: bool) -> None:
        """Makes the staging folder, or finds what an earlier run left in it."""
        if self.staging.is_published(plan) and not restart:
            return
        check_output(self._out, overwrite)
        self.staging.open(plan, restart)
        self.staging.finished([shard.name for shard in self.shards])

    def _complete(self, plan: dict[str, Any], overwrite: bool, summarize: Describe) -> dict[str, Any]:
        """Publishes the dataset, unless an earlier run had, and returns the report."""
        if not self.staging.dataset.exists():
            self.staging.tidy()
            return json.loads((self._out / REPORT_NAME).read_text())
        report = self._finish(plan, summarize)
        self.staging.publish(overwrite)
        return report

    @contextlib.contextmanager
    def _noting_what_is_kept(self) -> Iterator[None]:
        """Says of an error of the disk what an interrupted labelling leaves."""
        try:
            yield
        except OSError as error:
            finished = sum(self.staging.read_notes(shard.name) is not None for shard in self.shards)
            raise OutputError(
                f"{self._out} cannot be written: {error}. {finished} of {len(self.shards)} shards are finished and "
                f"kept in {self.staging.folder}; the same command goes on from there."
            ) from error

    def _label_own(self, params: Any, progress: Progress) -> None:
        """Labels this host's share of the shards, those of all hosts that are not finished."""
        mine = self.shards[jax.process_index() :: jax.process_count()]
        pending = [shard for shard in mine if self.staging.read_notes(shard.name) is None]
        if not pending:
            return
        gaps = [gap_steps(self._settings.gap_seconds, source.control_rate) for source in self._sources.values()]
        mesh = _local_mesh()
        labeller = StreamLabeller(
            self._run.model,
            jax.device_put(params, sharding.replicated(mesh)),
            mesh,
            batch_size=self._settings.batch_size,
            max_gap=int(max(gap.max() for gap in gaps)),
        )
        readers = {split: self._reader(source) for split, source in self._sources.items()}
        for shard in pending:
            labels = self._label_shard(labeller, readers[shard.split], shard)
            write_labelled_table(self._directory / shard.table, self.staging.dataset / shard.table, labels)
            notes = self._notes(shard, labels)
            self.staging.write_notes(shard.name, [shard.table], notes)
            progress(shard, notes)

    def _label_shard(self, labeller: StreamLabeller, reader: FrameReader, shard: LabelShard) -> StepLabels:
        source = self._sources[shard.split]
        rows = slice(shard.first_episode, shard.first_episode + shard.num_episodes)
        lengths, gap = source.length[rows], gap_steps(self._settings.gap_seconds, source.control_rate[rows])
        labels = labeller(
            reader,
            np.repeat(np.arange(rows.start, rows.stop), lengths),
            shard.first_record + np.arange(shard.num_records),
            steps_back(lengths, gap),
        )
        if len(labels.unreadable) == shard.num_records:
            raise DatasetError(f"{self._directory}: no picture of shard {shard.name} can be read.")
        return labels

    def _reader(self, source: EpisodeSource) -> FrameReader:
        entry = MixtureEntry(str(self._directory), fit=self._settings.fit)
        clips = ClipConfig(self._settings.gap_seconds, offset_frames=False)
        # Frames are asked for by their records, so that no clips have to be found.
        nothing = np.empty(0, np.int64)
        part = MixturePart(entry, source, clips, ClipIndex(nothing, nothing, nothing, nothing, 0, 0))
        return FrameReader(Mixture((part,)), self._run.config.data.image_size, num_threads=self._threads)

    def _notes(self, shard: LabelShard, labels: StepLabels) -> dict[str, Any]:
        source = self._sources[shard.split]
        episodes = np.searchsorted(source.start, labels.unreadable, side="right") - 1
        unreadable = [
            {"episode": source.episode_id[episode], "step": int(record - source.start[episode])}
            for episode, record in zip(episodes.tolist(), labels.unreadable.tolist(), strict=True)
        ]
        return {"steps": shard.num_records, "labelled": int(labels.valid.sum()), "unreadable": unreadable}

    def _finish(self, plan: dict[str, Any], summarize: Describe) -> dict[str, Any]:
        """Makes a dataset of the labelled tables, and returns the report."""
        target = self.staging.dataset
        for source in self._sources.values():
            for path in source.record_files:
                _link(epath.Path(path), target / epath.Path(path).name)
        for name in _COPIED:
            if (self._directory / name).exists():
                (target / name).write_bytes((self._directory / name).read_bytes())
        write_flat_table(target, self.shards, target / FLAT_NAME)
        statistics = json.loads((self._directory / "statistics.json").read_text())
        write_json(target / "statistics.json", {**statistics, "latent_motion": latent_statistics(target, self.shards)})
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        notes = [self._finished_notes(shard) for shard in self.shards]
        report = {
            "episodes": sum(shard.num_episodes for shard in self.shards),
            "steps": sum(each["steps"] for each in notes),
            "labelled": sum(each["labelled"] for each in notes),
            "unreadable": [entry for each in notes for entry in each["unreadable"]],
            **summarize(target, self.shards),
        }
        write_json(target / LABELS_NAME, {**plan, "date": date})
        write_json(target / REPORT_NAME, report)
        return report

    def _finished_notes(self, shard: LabelShard) -> dict[str, Any]:
        notes = self.staging.read_notes(shard.name)
        if notes is None:
            raise OutputError(f"shard {shard.name} is not in {self.staging.folder}: can all hosts reach it?")
        return notes


def _on_this_host(params: Any) -> Any:
    """Parameters as NumPy arrays, of which every host holds all."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), params)


def _local_mesh() -> Mesh:
    """All devices of this host, between which frames are shared out."""
    devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
    return Mesh(devices, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _check_outside(out: epath.Path, directory: epath.Path) -> None:
    """Raises OutputError for an output inside the dataset, or in its place."""
    local = is_local(out) and is_local(directory)
    if local and out.resolve().is_relative_to(directory.resolve()):
        raise OutputError(f"--out {out} lies in the dataset --data {directory}; choose a folder outside of it.")


def _link(source: epath.Path, target: epath.Path) -> None:
    """Gives a file a second name, or copies it where that cannot be."""
    if is_local(source) and is_local(target):
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    with source.open("rb") as old, target.open("wb") as new:
        shutil.copyfileobj(old, new)
