"""Times labelling beside its limit, the encoder over frames in memory, and beside labelling every pair by itself.

    python -m tools.benchmarks.labelling
    python -m tools.benchmarks.labelling --config configs/pretrain_como.py:tiny --steps 2000 --batch_size 64

Uses the first steps of --data, or of the embedded environment without it, and a model with random parameters in
float32. After compilation, all that is compared runs in turn, in several rounds, on the same frames. The images that
the labeller decodes are counted. With the defaults this takes about two minutes on two cores.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from como_jax import cli
from como_jax.convert.catalog import BUILDERS, make_settings
from como_jax.data.clips import ClipConfig, gap_steps
from como_jax.data.mixture import Mixture, MixtureEntry
from como_jax.data.motion_data import ClipFiller
from como_jax.data.reader import BatchReader
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError
from como_jax.labelling.streaming import StreamLabeller, read_frames, single_frames, steps_back
from como_jax.motion.models import build_model
from como_jax.nn.model_def import ModelDef, Params
from como_jax.training import sharding
from tools.benchmarks.machine import describe_machine

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/pretrain_como.py:base", "Recipe, as for experiments.pretrain; float32 here, whatever it says."
)
_DATA = flags.DEFINE_string("data", None, "Dataset directory; without it the embedded environment.")
_STEPS = flags.DEFINE_integer(
    "steps", 16, "Steps to label, a multiple of --batch_size, the first of the training episodes.", lower_bound=2
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Frames, or pairs, at once.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Times that every measurement is made, in turn.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "Decoding threads.", lower_bound=1)

Contestants = dict[str, tuple[int, Callable[[], Any]]]


class Steps(NamedTuple):
    """Steps `[S]` of consecutive episodes: rows of their episodes, their records, and `steps_back`."""

    episode: np.ndarray
    records: np.ndarray
    back: np.ndarray

    @classmethod
    def first_of(cls, source: EpisodeSource, count: int, gap_seconds: float) -> Steps:
        """The first `count` steps of a dataset, or all of them if they are fewer."""
        length = np.diff(np.minimum([*source.start, len(source)], count))
        gap = gap_steps(gap_seconds, source.control_rate)
        return cls(np.repeat(np.arange(len(length)), length), np.arange(length.sum()), steps_back(length, gap))

    def head(self, batch_size: int) -> Steps:
        """The smallest number of steps that holds a batch and a pair."""
        count = max(batch_size, int(np.flatnonzero(self.back)[0]) + 1)
        return Steps(*(field[:count] for field in self))


def open_reader(folder: Path, config: ConfigDict) -> BatchReader:
    """Opens the training episodes of --data, or of the embedded environment, which it converts into a folder."""
    directory = _DATA.value
    if directory is None:
        settings = {"image_size": config.data.image_size, "episodes": 8, "validation_fraction": 0.0}
        BUILDERS["tabletop"](folder / "data", make_settings("tabletop", settings), None).convert()
        directory = str(folder / "data")
    clips = ClipConfig(config.data.gap_seconds, offset_frames=False)
    mixture = Mixture.open([MixtureEntry(directory)], "train", clips)
    return BatchReader(ClipFiller(mixture), config.data.image_size, num_threads=_THREADS.value)


class Programs:
    """The compiled parts of a model that are timed, and its parameters."""

    def __init__(self, model: ModelDef, params: Params):
        self.encode_frame = functools.partial(jax.jit(lambda params, x: model.bind(params).encode_frame(x)), params)
        self.encode_pair = functools.partial(jax.jit(lambda params, *x: model.bind(params).encode_pair(*x)), params)
        self.encode = functools.partial(jax.jit(lambda params, x: model.bind(params).encode(x)), params)


def contestants(programs: Programs, labeller: StreamLabeller, reader: BatchReader, steps: Steps) -> Contestants:
    """All that is timed, by name, each with the number of frames or pairs that it processes."""
    frames = read_frames(reader, single_frames(steps.episode, steps.records))[0]
    batches = list(_whole_batches(frames, labeller.batch_size))
    count = len(batches) * labeller.batch_size
    embedded = jax.block_until_ready(programs.encode_frame(batches[0]))
    targets = np.flatnonzero(steps.back)
    pairs = list(_whole_batches(np.stack([targets - steps.back[targets], targets], axis=1), labeller.batch_size))

    def encode_pairs() -> list[jax.Array]:
        return [programs.encode(_read_pairs(reader, steps, rows)) for rows in pairs]

    return {
        "labelling": (len(steps.records), lambda: labeller(reader, *steps)),
        "encoder alone": (count, lambda: [programs.encode_frame(batch) for batch in batches]),
        "inverse dynamics alone": (count, lambda: [programs.encode_pair(embedded, embedded) for _ in batches]),
        "every pair by itself": (len(pairs) * labeller.batch_size, encode_pairs),
    }


def _read_pairs(reader: BatchReader, steps: Steps, rows: np.ndarray) -> np.ndarray:
    """Frames uint8 `[B, 2, H, W, 3]` of the steps `[B, 2]`."""
    read = [read_frames(reader, single_frames(steps.episode[part], steps.records[part]))[0] for part in rows.T]
    return np.stack(read, axis=1)


def _whole_batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Splits steps into one or more full batches; the rest is dropped, since its padding would count as work."""
    count = max(1, len(rows) // size)
    return iter(np.resize(rows[: count * size], (count, size, *rows.shape[1:])))


def time_all(runs: Contestants, rounds: int) -> dict[str, list[float]]:
    """Frames or pairs per second of each, one number for every round."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (count, run) in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            rates[name].append(count / (time.perf_counter() - begin))
    return rates


@contextlib.contextmanager
def counting_images() -> Iterator[list[int]]:
    """Collects the numbers of all records that are read for decoding."""
    seen: list[int] = []
    read = EpisodeSource.read_cameras

    def count(source: EpisodeSource, records: Sequence[int], cameras: Sequence[str]) -> list[list[bytes]]:
        seen.extend(records)
        return read(source, records, cameras)

    with mock.patch.object(EpisodeSource, "read_cameras", count):
        yield seen


def print_rates(rates: dict[str, list[float]], share: float) -> None:
    """Prints all beside labelling.

    Args:
      rates: frames or pairs a second.
      share: of the steps, those that have a label; labelling works off the others too, and pairs by themselves do not.
    """
    for name, found in rates.items():
        ratio = statistics.median(mine / other for mine, other in zip(rates["labelling"], found, strict=True))
        spread = f"({min(found):.2f}-{max(found):.2f})"
        print(f"  {name:28} {statistics.median(found):8.2f} {spread:>17}   labelling: {ratio:.2f} times")
        if name == "every pair by itself":
            print(
                f"  in valid labels a second, which {share:.0%} of the steps have, labelling: {ratio * share:.2f} times"
            )
    encoder, dynamics = (1 / statistics.median(rates[f"{name} alone"]) for name in ("encoder", "inverse dynamics"))
    both = encoder + dynamics
    print(
        f"  encoder and inverse dynamics one after the other: {1 / both:.2f}, {encoder / both:.2f} times the encoder "
        f"alone; labelling cannot be faster, nor more than {(encoder + both) / both:.2f} times as fast as pair by pair"
    )


def main(arguments: Sequence[str]) -> None:
    """Prints machine, shapes, rates, ratios and the count of images."""
    cli.no_arguments(arguments)
    config = _CONFIG.value
    config.train.dtype = "float32"
    mesh = sharding.make_mesh()
    model = build_model(config)
    params = jax.device_put(jax.jit(model.init)(jax.random.key(0)), sharding.replicated(mesh))
    with tempfile.TemporaryDirectory() as folder:
        reader = open_reader(Path(folder), config)
        source = reader.filler.parts[0].source
        steps = Steps.first_of(source, _STEPS.value, config.data.gap_seconds)
        if not steps.back.any():
            raise ConfigError(f"--steps {_STEPS.value} holds no pair of frames; take more.")
        gap = int(steps.back.max())
        labeller = StreamLabeller(model, params, mesh, batch_size=_BATCH_SIZE.value, max_gap=gap)
        print(describe_machine())
        print(
            f"{config.family}, {config.data.image_size} px, float32, batches of {labeller.batch_size}; "
            f"{len(steps.records)} steps of {steps.episode[-1] + 1} episodes, pairs {gap} steps apart; "
            f"frames or pairs a second, median of {_ROUNDS.value} (range)"
        )
        with counting_images() as seen:
            valid = int(labeller(reader, *steps).valid.sum())
        programs = Programs(model, params)
        time_all(contestants(programs, labeller, reader, steps.head(labeller.batch_size)), rounds=1)
        rates = time_all(contestants(programs, labeller, reader, steps), _ROUNDS.value)
        print_rates(rates, valid / len(steps.records))
        print(
            f"images decoded: {len(seen)}, of {len(set(seen))} records; {len(seen) / len(steps.records):.3f} a step, "
            f"{len(seen) / valid:.3f} a valid label, of which there are {valid}"
        )


if __name__ == "__main__":
    cli.run(main)
