"""Labels a dataset with latent motion, shard by shard, on all hosts of a job; resumes after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, Mesh

from como_jax import hosts
from como_jax.data.clips import ClipConfig, ClipIndex, gap_steps
from como_jax.data.episode_table import read_part, table_name, write_episode_table
from como_jax.data.identity import Identity, identify
from como_jax.data.mixture import Mixture, MixtureEntry, MixturePart
from como_jax.data.motion_data import ClipFiller
from como_jax.data.reader import BatchReader
from como_jax.data.schema import LABELS_NAME, SPLITS
from como_jax.data.sources import EpisodeSource
from como_jax.errors import DatasetError, OutputError
from como_jax.files import write_json
from como_jax.labelling.shards import (
    LabelShard,
    latent_statistics,
    list_shards,
    write_flat_table,
    write_labelled_part,
)
from como_jax.labelling.streaming import StepLabels, StreamLabeller, steps_back
from como_jax.motion.models import codebook_size
from como_jax.nn.model_def import Params
from como_jax.staging import Staging, check_apart, check_output, is_local, make_parent, real_output
from como_jax.training import sharding
from como_jax.training.run import Run

REPORT_NAME, FLAT_NAME = "labelling_report.json", "latents.parquet"
_COPIED = ("dataset_info.json", "features.json", "metadata.json", "conversion_report.json")
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "simplejpeg", "opencv-python-headless")

Summarize = Callable[[epath.Path, list[LabelShard]], dict[str, Any]]
Progress = Callable[[LabelShard, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How a dataset is labelled.

    Attributes:
      gap_seconds: time between the two frames of a pair, whatever the dataset's control rate.
      camera: observation key; empty for the dataset's first camera.
      fit: how images become square, see `como_jax.data.transforms`.
      batch_size: frames per batch, on all devices of a host together.
    """

    gap_seconds: float
    camera: str = ""
    fit: str = "crop"
    batch_size: int = 64


class DatasetLabeller:
    """Labels one dataset by the model of one run, into one directory."""

    def __init__(self, run: Run, directory: epath.PathLike, out: epath.PathLike, settings: LabelSettings, threads: int):
        """Opens the dataset, with so many threads that decode; `label` does the work.

        Raises:
          DatasetError: the directory holds no dataset, or not the camera.
        """
        self._directory, self._out = epath.Path(directory), real_output(out)
        self._settings, self._run, self._threads = settings, run, threads
        self.shards = list_shards(self._directory)
        self._sources = {
            split: EpisodeSource(self._directory, split, settings.camera)
            for split in SPLITS
            if any(shard.split == split for shard in self.shards)
        }
        self.staging = Staging(self._out, "labelling")

    def label(
        self, *, overwrite: bool = False, restart: bool = False, progress: Progress, summarize: Summarize
    ) -> dict[str, Any]:
        """Labels all shards, or those that an earlier run of the same labelling has left.

        All hosts of a job call it; each labels its share of the shards, and the first finishes the dataset.

        Args:
          overwrite: replace an existing dataset.
          restart: discard what a stopped labelling left.
          progress: called with every shard that this host has finished, and its notes.
          summarize: makes further entries of the report from the labelled shards, on the first host.

        Returns:
          The report.

        Raises:
          OutputError: `out` exists, or another labelling into it is running or was stopped.
          DatasetError: no image of a shard can be read.
        """
        params, is_first = _on_this_host(self._run.params), hosts.is_first()
        plan: dict[str, Any] = {}
        with contextlib.ExitStack() as lock:
            with hosts.in_step(OutputError):
                if is_first:
                    check_apart(self._out, self._directory, "`data`")
                    plan = self._describe(params)
                    make_parent(self._out)
                    lock.enter_context(self.staging.locked())
                    self._open(plan, overwrite, restart)
            with self._noting_what_is_kept(), hosts.in_step(OutputError):
                # There is none if an earlier run had published the dataset and had only to tidy up.
                if self.staging.dataset.exists():
                    self._label_own(params, progress)
            with self._noting_what_is_kept(), hosts.in_step(OutputError):
                return self._complete(plan, overwrite, summarize) if is_first else {}

    def _describe(self, params: Params) -> dict[str, Any]:
        data = identify(self._directory, self._sources.values())
        return describe(self._run, hash_params(params), str(self._directory), data, self.shards, self._settings)

    def _open(self, plan: dict[str, Any], overwrite: bool, restart: bool) -> None:
        """Makes the staging folder, or finds what an earlier run left in it."""
        if self.staging.is_published(plan) and not restart:
            return
        check_output(self._out, overwrite)
        self.staging.open(plan, restart)
        self.staging.finished([shard.name for shard in self.shards])

    def _complete(self, plan: dict[str, Any], overwrite: bool, summarize: Summarize) -> dict[str, Any]:
        """Publishes the dataset, unless an earlier run had, and returns the report."""
        if not self.staging.dataset.exists():
            self.staging.tidy()
            return json.loads((self._out / REPORT_NAME).read_text())
        report = self._finish(plan, summarize)
        self.staging.publish(overwrite)
        return report

    @contextlib.contextmanager
    def _noting_what_is_kept(self) -> Iterator[None]:
        """Adds to an error of the disk what the interrupted labelling keeps."""
        try:
            yield
        except OSError as error:
            finished = sum(self.staging.read_notes(shard.name) is not None for shard in self.shards)
            raise OutputError(
                f"{self._out} cannot be written: {error}. {finished} of {len(self.shards)} shards are finished and "
                f"kept in {self.staging.folder}; the same command resumes from there."
            ) from error

    def _label_own(self, params: Any, progress: Progress) -> None:
        """Labels the unfinished shards of this host's share."""
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
            episodes = self._sources[shard.split].table.read_group(shard.number)
            write_labelled_part(episodes, self._part(shard), labels)
            notes = self._notes(shard, labels)
            self.staging.write_notes(shard.name, [self._part(shard)], notes)
            progress(shard, notes)

    def _part(self, shard: LabelShard) -> epath.Path:
        """The file of a shard's part of the labelled episode table."""
        return self.staging.parts / f"episodes-{shard.name}.parquet"

    def _label_shard(self, labeller: StreamLabeller, reader: BatchReader, shard: LabelShard) -> StepLabels:
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
            raise DatasetError(f"{self._directory}: no image of shard {shard.name} can be read.")
        return labels

    def _reader(self, source: EpisodeSource) -> BatchReader:
        entry = MixtureEntry(str(self._directory), fit=self._settings.fit)
        clips = ClipConfig(self._settings.gap_seconds, offset_frames=False)
        # Frames are read by the numbers of their records, so the reader needs no clips.
        filler = ClipFiller(Mixture((MixturePart(entry, source, clips, ClipIndex.empty()),)))
        return BatchReader(filler, self._run.config.data.image_size, num_threads=self._threads)

    def _notes(self, shard: LabelShard, labels: StepLabels) -> dict[str, Any]:
        source = self._sources[shard.split]
        episodes = np.searchsorted(source.start, labels.unreadable, side="right") - 1
        unreadable = [
            {"episode": source.episode_id[episode], "step": int(record - source.start[episode])}
            for episode, record in zip(episodes.tolist(), labels.unreadable.tolist(), strict=True)
        ]
        return {"steps": shard.num_records, "labelled": int(labels.valid.sum()), "unreadable": unreadable}

    def _finish(self, plan: dict[str, Any], summarize: Summarize) -> dict[str, Any]:
        """Completes the labelled parts to a dataset, and returns the report."""
        target = self.staging.dataset
        for split, source in self._sources.items():
            for path in source.record_files:
                _link(epath.Path(path), target / epath.Path(path).name)
            parts = (read_part(self._part(shard)) for shard in self.shards if shard.split == split)
            write_episode_table(target / table_name(split), parts, source.table.shards)
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
            raise OutputError(
                f"shard {shard.name} is not in {self.staging.folder}; all hosts must write to the same file system."
            )
        return notes


def hash_params(params: Params) -> str:
    """A digest of all parameters of a model, in the order of their names."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda item: str(item[0])):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def describe(
    run: Run, params_hash: str, directory: str, data: Identity, shards: list[LabelShard], settings: LabelSettings
) -> dict[str, Any]:
    """Everything that decides what the labels are: the plan of a labelling, and most of labels.json."""
    tables = json.dumps([dataclasses.asdict(shard) for shard in shards])
    return {
        "run": str(run.workdir),
        "step": run.step,
        "family": run.config.family,
        "parameters": params_hash,
        "latent_shape": list(latent_shape(run)),
        "codebook_size": codebook_size(run.config),
        "config": json.loads(run.config.to_json_best_effort()),
        "dataset": directory,
        "data": data,
        "episodes and steps": hashlib.blake2b(tables.encode(), digest_size=16).hexdigest(),
        "settings": dataclasses.asdict(settings),
        "versions": {name: metadata.version(name) for name in _LIBRARIES},
        "backend": jax.default_backend(),
    }


def latent_shape(run: Run) -> tuple[int, int]:
    """Number of latent tokens per transition, and numbers of each."""
    size = run.config.data.image_size
    frames = jax.ShapeDtypeStruct((1, 2, size, size, 3), np.uint8)
    return jax.eval_shape(lambda params, frames: run.model.bind(params).encode(frames), run.params, frames).shape[2:]


def _on_this_host(params: Any) -> Any:
    """Parameters, of which every host holds all, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), params)


def _local_mesh() -> Mesh:
    """All devices of this host, over which frames are split."""
    devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
    return Mesh(devices, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _link(source: epath.Path, target: epath.Path) -> None:
    """Makes a hard link to a file, or a copy where links are impossible."""
    if is_local(source) and is_local(target):
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    with source.open("rb") as old, target.open("wb") as new:
        shutil.copyfileobj(old, new)
