"""Measures start-up time, open files and memory of reading datasets of many shards.

    python -m tools.benchmarks.shards
    python -m tools.benchmarks.shards --shards 1,1000,100000

A dataset of one shard of the embedded environment is made, and others of the same shard many times, by hard links. Each
is opened as pretraining, labelling and evaluation open it, without their models, in a process of its own. The start-up
ends with the first batch, and its seconds are those of the CPU; then the other samples are read, in pretraining at
random. The identity of the data, which a run and a labelling keep, is measured by itself, since it reads all numbers of
the dataset. Memory is what was added after the imports, open files are counted at the end.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from etils import epath

from como_jax import cli
from como_jax.convert.catalog import BUILDERS, make_settings
from como_jax.data.clips import ClipConfig
from como_jax.data.episode_table import (
    EpisodeTable,
    ShardSizes,
    share_groups,
    table_name,
    write_episode_table,
)
from como_jax.data.identity import identify
from como_jax.data.mixture import Mixture, MixtureEntry
from como_jax.data.motion_data import ClipFiller
from como_jax.data.pipeline import evaluation_batches
from como_jax.data.reader import BatchReader
from como_jax.errors import ConfigError
from como_jax.labelling.shards import list_shards
from tools.benchmarks.machine import describe_machine

_SHARDS = flags.DEFINE_list("shards", ["1", "10", "1000", "10000"], "Numbers of shards.")
_SAMPLES = flags.DEFINE_integer("samples", 1024, "Samples that are read, in batches of 32.", lower_bound=32)

USES = ("pretraining", "labelling", "evaluation", "identity")
_BATCH = 32
# File systems limit the links to one file.
_LINKS = 10_000


class Measurement(NamedTuple):
    """What reading a dataset took: seconds of the CPU and of the clock, open files, and memory at the end."""

    cpu_seconds: float
    seconds: float
    open_files: int
    megabytes: float


def multiply(source: Path, target: Path, count: int) -> None:
    """Makes a dataset whose training episodes are the first training shard of another, `count` times."""
    target.mkdir()
    info = json.loads((source / "dataset_info.json").read_text())
    [split] = [split for split in info["splits"] if split["name"] == "train"]
    records = Path(tfds.builder_from_directory(source).info.splits["train"].filepaths[0])
    info["splits"] = [split | {"shardLengths": split["shardLengths"][:1] * count}]
    (target / "dataset_info.json").write_text(json.dumps(info))
    for name in ("features.json", "metadata.json", "statistics.json"):
        if (source / name).exists():
            shutil.copy(source / name, target)
    names = [Path(path).name for path in tfds.builder_from_directory(target).info.splits["train"].filepaths]
    for number, name in enumerate(names):
        if number % _LINKS == 0:
            shutil.copy(records, target / name)
            linked = target / name
        else:
            os.link(linked, target / name)
    table = EpisodeTable(source, "train")
    episodes, sizes = table.read_group(0), ShardSizes(*(np.repeat(values[:1], count) for values in table.shards))
    path = target / table_name("train")
    write_episode_table(path, itertools.repeat(episodes, count), sizes, share_groups(count))


def measure(use: str, directory: str, samples: int) -> Measurement:
    """Opens a dataset and reads samples, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=_measure, args=(use, directory, samples, far))
    process.start()
    far.close()
    try:
        return near.recv()
    except EOFError:
        raise ConfigError(f"{use} of {directory} failed, see above.") from None
    finally:
        process.join()


def _measure(use: str, directory: str, samples: int, connection: multiprocessing.connection.Connection) -> None:
    memory, begin, cpu = _megabytes(), time.monotonic(), time.process_time()
    if use == "identity":
        identify(directory)
        used = time.process_time() - cpu, time.monotonic() - begin
        connection.send(Measurement(*used, len(os.listdir("/proc/self/fd")), _megabytes() - memory))
        return
    if use == "labelling":
        list_shards(epath.Path(directory))
    mixture = Mixture.open([MixtureEntry(directory)], "train", ClipConfig(0.2, offset_frames=False))
    reader = BatchReader(ClipFiller(mixture, actions=use == "evaluation"), 64, num_threads=2)
    if use == "evaluation":
        batches = (batch for batch, _ in evaluation_batches(reader, num_samples=samples, batch_size=_BATCH))
    else:
        numbers = np.arange(samples) % mixture.num_clips
        if use == "pretraining":
            numbers = np.random.default_rng(0).integers(0, mixture.num_clips, samples)
        batches = (reader.read(numbers[first : first + _BATCH]) for first in range(0, samples, _BATCH))
    next(batches)
    used = time.process_time() - cpu, time.monotonic() - begin
    for _ in batches:
        pass
    connection.send(Measurement(*used, len(os.listdir("/proc/self/fd")), _megabytes() - memory))


def _megabytes() -> float:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main(arguments: Sequence[str]) -> None:
    """Measures every use with every number of shards, and prints a table in Markdown."""
    cli.no_arguments(arguments)
    if not all(number.isdigit() and int(number) for number in _SHARDS.value):
        raise ConfigError(f"`shards` {','.join(_SHARDS.value)} must be positive whole numbers.")
    print(describe_machine())
    print("| shards | use | start-up, CPU | by the clock | open files | memory |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one"
        settings = make_settings("tabletop", {"episodes": 4, "image_size": 64, "validation_fraction": 0.0})
        BUILDERS["tabletop"](one, settings).convert()
        for count in map(int, _SHARDS.value):
            many = Path(folder) / f"of_{count}"
            multiply(one, many, count)
            for use in USES:
                found = measure(use, str(many), _SAMPLES.value)
                print(
                    f"| {count:,} | {use} | {found.cpu_seconds:.1f} s | {found.seconds:.1f} s | {found.open_files} | "
                    f"{found.megabytes:.0f} MB |",
                    flush=True,
                )
            shutil.rmtree(many)


if __name__ == "__main__":
    cli.run(main)
