"""Times the input pipeline beside its limit, which is bare JPEG decoding.

    python -m tools.benchmarks.loader --source clips
    python -m tools.benchmarks.loader --source clips --stored_size 256 --instants 2

The videos of --source, or without it episodes of the embedded environment, are converted into a temporary dataset. Both
read random pairs of its frames, half a second apart, in turn and in several rounds, on one core, to which the process
pins itself; the pipeline also with all frames decoded before and kept. Then it runs on all cores, and its memory is
watched over several epochs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from absl import flags

from como_jax import cli
from como_jax.convert.catalog import BUILDERS, make_settings
from como_jax.data.clips import ClipConfig
from como_jax.data.mixture import Mixture, MixtureEntry
from como_jax.data.motion_data import ClipFiller
from como_jax.data.pipeline import stream_batches
from como_jax.data.reader import BatchReader
from como_jax.data.sampler import Augmentation, BatchSampler
from como_jax.errors import ConfigError
from tools.benchmarks.machine import describe_machine

_SOURCE = flags.DEFINE_string("source", None, "Folder of videos; without it the embedded environment.")
_STORED_SIZE = flags.DEFINE_integer("stored_size", 224, "Shorter side of the stored images.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Side of the frames of a batch.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Pairs of a batch.")
_SECONDS = flags.DEFINE_float("seconds", 4.0, "Time of one measurement.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that every measurement is made, in turn.")
_EPOCHS = flags.DEFINE_integer("epochs", 10, "Epochs over which memory is watched; 0 for none.")

_GAP_SECONDS = 0.5
_SHIFT = 10
_DECODED_IN_TURN = 500
_CACHE_BYTES = 2**32


def convert(directory: Path) -> Mixture:
    """The frames to be loaded, as a dataset."""
    settings = {"image_size": _STORED_SIZE.value, "validation_fraction": 0.0}
    if _SOURCE.value is None:
        name, settings = "tabletop", {**settings, "episodes": 40, "look": "hard"}
    else:
        name, settings = "video_folder", {**settings, "source": _SOURCE.value}
    BUILDERS[name](directory, make_settings(name, settings), None).convert()
    return Mixture.open([MixtureEntry(str(directory))], "train", ClipConfig(_GAP_SECONDS, offset_frames=False))


def batches(mixture: Mixture, threads: int, cache_bytes: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """The pipeline under test."""
    filler = ClipFiller(mixture)
    sampler = BatchSampler(filler, Augmentation(_SHIFT), batch_size=_BATCH_SIZE.value, seed=0)
    reader = BatchReader(filler, _IMAGE_SIZE.value, num_threads=threads, cache_bytes=cache_bytes)
    return iter(stream_batches(sampler, reader))


def time_bare_decoding(mixture: Mixture) -> Callable[[], float]:
    """Frames per second when JPEGs in memory are decoded one after the other by the library alone."""
    source = mixture.parts[0].source
    jpegs = source.read_jpegs(np.linspace(0, len(source) - 1, min(_DECODED_IN_TURN, len(source))).astype(int).tolist())

    def measure() -> float:
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < _SECONDS.value:
            for jpeg in jpegs:
                simplejpeg.decode_jpeg(jpeg, "RGB")
            count += len(jpegs)
        return count / (time.perf_counter() - begin)

    return measure


def time_pipeline(mixture: Mixture, threads: int, cache_bytes: int = 0) -> Callable[[], float]:
    """Frames per second of the pipeline, measured from its start, so that no batch is read beforehand."""

    def measure() -> float:
        begin, count = time.perf_counter(), 0
        stream = batches(mixture, threads, cache_bytes)
        while time.perf_counter() - begin < _SECONDS.value:
            count += 2 * len(next(stream)["frames"])
        return count / (time.perf_counter() - begin)

    return measure


def decode_all(mixture: Mixture) -> None:
    """Reads all clips once, and keeps their frames."""
    stream = batches(mixture, 1, _CACHE_BYTES)
    for _ in range(-(-mixture.num_clips // _BATCH_SIZE.value)):
        next(stream)


def watch_memory(mixture: Mixture, threads: int) -> tuple[float, float]:
    """Memory of the process in MiB, after the first epoch and after the last."""
    stream, first = batches(mixture, threads), 0.0
    steps = max(1, mixture.num_clips // _BATCH_SIZE.value)
    for epoch in range(_EPOCHS.value):
        for _ in range(steps):
            next(stream)
        first = first if epoch else resident_mib()
    return first, resident_mib()


def resident_mib() -> float:
    """Memory of this process, on Linux."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def pin(cores: set[int]) -> None:
    """Pins the process, and all threads that it starts from now on, to some cores."""
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("this benchmark compares on one core, and this system cannot pin a process to one")
    os.sched_setaffinity(0, cores)


def main(arguments: Sequence[str]) -> None:
    """Prints machine, data, rates and ratios."""
    cli.no_arguments(arguments)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        mixture = convert(Path(folder, "data"))
        pin({min(cores)})
        source = mixture.parts[0].source
        height, width, *_ = simplejpeg.decode_jpeg_header(source.read_jpegs([0])[0])
        print(
            f"{len(source)} frames of {width} x {height} in {len(source.length)} episodes, to {_IMAGE_SIZE.value} px, "
            f"batches of {_BATCH_SIZE.value} pairs; frames a second on one core, median of {_ROUNDS.value} (range)"
        )
        contestants = {
            "bare JPEG decoding": time_bare_decoding(mixture),
            "the pipeline": time_pipeline(mixture, 1),
            "it, with frames kept": time_pipeline(mixture, 1, _CACHE_BYTES),
        }
        decode_all(mixture)
        compare(contestants, "the pipeline")
        if len(cores) > 1:
            scale(mixture, cores)
        if _EPOCHS.value:
            first, last = watch_memory(mixture, len(cores))
            print(
                f"resident memory: {first:.0f} MiB after epoch 1, {last:.0f} MiB after epoch {_EPOCHS.value} "
                f"({last / first - 1:+.1%})"
            )


def compare(contestants: dict[str, Callable[[], float]], ours: str) -> None:
    """Measures all in turn, several times, and prints the rate of each beside that of the pipeline."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for measure in contestants.values():
        measure()  # Files come into the page cache, and libraries start.
    for _ in range(_ROUNDS.value):
        for name, measure in contestants.items():
            rates[name].append(measure())
    for name, found in rates.items():
        ratio = statistics.median(mine / other for mine, other in zip(rates[ours], found, strict=True))
        spread = f"({min(found):.0f}-{max(found):.0f})"
        print(f"  {name:28} {statistics.median(found):7.0f} {spread:>13}   pipeline: {ratio:.2f} times")


def scale(mixture: Mixture, cores: set[int]) -> None:
    """Prints how much faster the pipeline is on all cores."""
    ratios, rates = [], []
    for _ in range(_ROUNDS.value):
        pin({min(cores)})
        alone = time_pipeline(mixture, 1)()
        pin(cores)
        rates.append(time_pipeline(mixture, len(cores))())
        ratios.append(rates[-1] / alone)
    print(
        f"  the pipeline, {len(cores)} cores: {statistics.median(rates):.0f}, {statistics.median(ratios):.2f} times one"
    )


if __name__ == "__main__":
    cli.run(main)
