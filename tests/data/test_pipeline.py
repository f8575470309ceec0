"""Samples and streams of batches, on a dataset of the embedded environment."""

import dataclasses
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import grain
import numpy as np
import pytest
from PIL import Image

from como_jax.data import pipeline
from como_jax.data.clips import ClipConfig
from como_jax.data.mixture import Mixture, MixtureEntry
from como_jax.data.motion_data import ClipFiller, optical_flow, to_frame_pairs
from como_jax.data.reader import BatchReader
from como_jax.data.sampler import Augmentation, BatchSampler
from como_jax.data.sources import EpisodeSource
from como_jax.errors import DatasetError

Batch = dict[str, Any]


@pytest.fixture(scope="module")
def source(tabletop_dataset: Path) -> EpisodeSource:
    return EpisodeSource(tabletop_dataset, "train")


@pytest.fixture(scope="module")
def open_reader(tabletop_dataset: Path) -> Callable[..., tuple[Mixture, BatchReader]]:
    """Opens a mixture of the dataset with the given weights; keyword arguments are those of `ClipConfig`."""

    def make(
        weights: tuple[float, ...] = (1.0,), size: int = 16, flow: bool = False, threads: int = 2, **clips: Any
    ) -> tuple[Mixture, BatchReader]:
        config = ClipConfig(**{"gap_seconds": 0.5, **clips})
        entries = [MixtureEntry(str(tabletop_dataset), weight) for weight in weights]
        mixture = Mixture.open(entries, "train", config)
        return mixture, BatchReader(ClipFiller(mixture, actions=True, flow=flow), size, num_threads=threads)

    return make


@pytest.fixture(scope="module")
def stream(open_reader: Callable) -> Callable[..., grain.IterDataset]:
    """Opens a stream of batches; other keyword arguments are those of `open_reader`."""

    def make(
        batch_size: int = 4,
        seed: int = 0,
        index: int = 0,
        count: int = 1,
        shift: int = 2,
        crop: float = 1.0,
        workers: int = 0,
        **reader: Any,
    ) -> grain.IterDataset:
        _, frames = open_reader(**reader)
        sampler = BatchSampler(
            frames.filler,
            Augmentation(shift, crop),
            batch_size=batch_size,
            seed=seed,
            rows=np.arange(batch_size).reshape(count, -1)[index],
        )
        return pipeline.stream_batches(sampler, frames, num_workers=workers)

    return make


def read(reader: BatchReader, clips: Any, seed: int = 0, **augmentation: Any) -> Batch:
    """Clips of the first dataset, drawn and augmented by a seed."""
    rng, datasets = np.random.default_rng(seed), np.zeros(len(clips), np.int64)
    return reader.map(reader.filler.draw(datasets, np.asarray(clips), rng, Augmentation(**augmentation)))


def take(batches: grain.IterDataset, count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def test_a_sample_holds_the_recorded_frames_a_gap_apart(open_reader: Callable, source: EpisodeSource) -> None:
    mixture, reader = open_reader(size=64, instants=3)
    index = mixture.parts[0].index
    clip = len(index) // 2
    batch = read(reader, [clip])
    first, gap = index.first[clip], index.gap[index.episode[clip]]
    jpegs = source.read_jpegs([first + k * gap for k in range(3)])
    recorded = [np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs]
    # Two decoders may round differently.
    np.testing.assert_allclose(batch["frames"][0].astype(int), np.stack(recorded), atol=2)
    assert batch["episode"] == [index.episode[clip]]
    start = source.start[index.episode[clip]]
    assert start <= first < first + 2 * gap < start + source.length[index.episode[clip]]


def test_actions_are_averaged_over_the_gap(open_reader: Callable, source: EpisodeSource) -> None:
    mixture, reader = open_reader(instants=3)
    index = mixture.parts[0].index
    first, gap = index.first[7], index.gap[index.episode[7]]
    assert gap > 1
    expected = [source.action[t : t + gap].mean(axis=0) for t in (first, first + gap)]
    batch = read(reader, [7])
    np.testing.assert_array_equal(batch["action"][0], expected)
    assert batch["action"].dtype == np.float32 and np.all(batch["has_action"] == 1)


def test_frames_and_offset_frames_get_the_same_shift(open_reader: Callable) -> None:
    mixture, reader = open_reader()
    still, moved = (read(reader, [3], seed=2, random_shift=shift) for shift in (0, 3))
    candidates = [
        (down, right)
        for down, right in itertools.product(range(-3, 4), repeat=2)
        if all(
            np.array_equal(np.roll(still[key][0], (-down, -right), (1, 2))[:, 3:13, 3:13], moved[key][0][:, 3:13, 3:13])
            for key in ("frames", "offset_frames")
        )
    ]
    assert len(candidates) == 1
    assert candidates != [(0, 0)]


def test_all_frames_of_a_clip_get_the_same_crop(open_reader: Callable) -> None:
    mixture, reader = open_reader(size=32, instants=3)
    rng, drawn = np.random.default_rng(0), Augmentation(0, 0.5)
    samples = reader.filler.draw(np.zeros(8, np.int64), np.arange(8), rng, drawn)
    assert samples.crop[:, 0].min() < 0.7 < samples.crop[:, 0].max() <= 1 and len(np.unique(samples.crop)) == 24
    # Reading the same image as every instant gives the same frame.
    first = samples.records[:, :1]
    same = dataclasses.replace(samples, records=np.repeat(first, 3, 1), offsets=np.repeat(first, 2, 1))
    batch = reader.map(same)
    for clip, offsets in zip(batch["frames"], batch["offset_frames"], strict=True):
        assert all(np.array_equal(clip[0], frame) for frame in [*clip, *offsets])
    assert np.any(batch["frames"] != reader.map(dataclasses.replace(same, crop=samples.crop[::-1]))["frames"])


def test_offset_frames_are_other_frames_than_the_future(open_reader: Callable) -> None:
    mixture, reader = open_reader(size=64)
    batch = read(reader, range(0, mixture.num_clips, 9))
    assert batch["offset_frames"].shape[1:] == (1, 64, 64, 3)
    assert np.any(batch["offset_frames"][:, 0] != batch["frames"][:, 1])


def test_a_batch_fits_the_data_contract(stream: Callable) -> None:
    [batch] = take(stream(instants=3), 1)
    pairs = to_frame_pairs(batch)
    pairs.check_shapes()
    assert pairs.frames.shape == (4, 3, 16, 16, 3)
    assert batch["action"].shape == (4, 2, 4)


def test_what_is_not_asked_for_is_not_read(stream: Callable) -> None:
    [batch] = take(stream(offset_frames=False), 1)
    assert to_frame_pairs(batch).offset_frames is None


def test_a_stream_repeats_by_seed(stream: Callable) -> None:
    chex.assert_trees_all_equal(take(stream(seed=3), 3), take(stream(seed=3), 3))
    assert any(
        np.any(a["frames"] != b["frames"]) for a, b in zip(stream(seed=3), take(stream(seed=4), 3), strict=False)
    )


def test_epochs_hold_every_clip_once_and_differ_in_order(open_reader: Callable, stream: Callable) -> None:
    num_clips = open_reader()[0].num_clips
    batches = take(stream(batch_size=num_clips, shift=0), 2)
    first, second = (sorted(zip(b["episode"], map(bytes, b["frames"][:, 0]), strict=True)) for b in batches)
    assert first == second
    assert batches[0]["episode"].tolist() != batches[1]["episode"].tolist()


def test_augmentation_differs_between_epochs(open_reader: Callable, stream: Callable) -> None:
    num_clips = open_reader()[0].num_clips
    first, second = ({bytes(clip) for clip in batch["frames"]} for batch in take(stream(batch_size=num_clips), 2))
    assert len(first & second) < num_clips / 2


def test_two_hosts_read_the_stream_of_one(stream: Callable) -> None:
    together = take(stream(crop=0.8), 3)
    hosts = [take(stream(crop=0.8, index=index, count=2), 3) for index in range(2)]
    joined = [
        {key: np.concatenate([first[key], second[key]]) for key in first} for first, second in zip(*hosts, strict=True)
    ]
    chex.assert_trees_all_equal(joined, together)


def test_the_number_of_threads_changes_nothing(stream: Callable) -> None:
    alone, together = (take(stream(batch_size=50, threads=threads, instants=3), 2) for threads in (1, 3))
    chex.assert_trees_all_equal(alone, together)


def test_mixture_weights_hold(stream: Callable) -> None:
    batches = take(stream(batch_size=100, weights=(3.0, 1.0), size=8), 10)
    share = np.mean([batch["dataset"] == 0 for batch in batches])
    assert share == pytest.approx(0.75, abs=0.01)


def test_equal_datasets_of_a_mixture_are_shuffled_differently(stream: Callable) -> None:
    [batch] = take(stream(batch_size=40, weights=(1.0, 1.0)), 1)
    orders = [batch["episode"][batch["dataset"] == number].tolist() for number in (0, 1)]
    assert orders[0] != orders[1]


def test_a_stream_resumes_where_its_checkpoint_was_taken(stream: Callable) -> None:
    batches = iter(stream())
    next(batches), next(batches)
    state, expected = batches.get_state(), [next(batches) for _ in range(3)]
    resumed = iter(stream())
    resumed.set_state(state)
    chex.assert_trees_all_equal([next(resumed) for _ in range(3)], expected)


@pytest.mark.slow
def test_worker_processes_read_the_same_batches(stream: Callable) -> None:
    chex.assert_trees_all_equal(take(stream(workers=2), 3), take(stream(), 3))


def test_evaluation_covers_a_dataset_evenly_and_fills_up_the_last_batch(open_reader: Callable) -> None:
    mixture, reader = open_reader(offset_frames=False)
    [part] = mixture.parts
    found = list(pipeline.evaluation_batches(reader, num_samples=10, batch_size=4))
    assert [count for _, count in found] == [4, 4, 2]
    episodes = np.concatenate([batch["episode"] for batch, _ in found])
    chosen = np.linspace(0, len(part.index) - 1, 10).astype(int)
    assert episodes.tolist() == [*part.index.episode[chosen], *[part.index.episode[-1]] * 2]


def test_hosts_share_the_batches_of_an_evaluation(open_reader: Callable) -> None:
    mixture, reader = open_reader(offset_frames=False)

    def batches(rows: slice = slice(None)) -> list[Batch]:
        found = pipeline.evaluation_batches(reader, num_samples=6, batch_size=4, rows=rows)
        return [batch for batch, _ in found]

    hosts = [batches(slice(2)), batches(slice(2, 4))]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*hosts, strict=True)]
    chex.assert_trees_all_equal(joined, batches())


def test_a_source_opens_its_files_anew_in_another_process(source: EpisodeSource) -> None:
    jpegs = source.read_jpegs([5, 2])
    assert pickle.loads(pickle.dumps(source)).read_jpegs([5, 2]) == jpegs


def test_the_description_says_what_is_in_a_mixture(open_reader: Callable) -> None:
    mixture, _ = open_reader(weights=(3.0, 1.0))
    first, second = mixture.describe()
    assert first.startswith(f"tabletop [train]: 75% of samples, {len(mixture.parts[0].source.length)} episodes")
    assert "25% of samples" in second
    assert f"{len(mixture.parts[0].index)} clips, gap 0.5 s, camera image" in first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "train"), "is not a dataset directory"),
        (("{dataset}", "test"), "has no split 'test'; it has: "),
        (("{dataset}", "train", "wrist"), "has no camera 'wrist'; it has: image"),
    ],
)
def test_a_source_that_cannot_be_opened_says_why(
    tabletop_dataset: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        EpisodeSource(*(argument.format(dataset=tabletop_dataset) for argument in arguments))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_record_that_cannot_be_decoded_is_named(
    open_reader: Callable, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    mixture, reader = open_reader(threads=threads)
    monkeypatch.setattr(EpisodeSource, "read_cameras", lambda self, records, cameras: [[b"damaged"]] * len(records))
    with pytest.raises(DatasetError, match=r"\(train\): record 0, camera 'image', cannot be decoded"):
        read(reader, [0])


def test_a_drawn_gap_spaces_the_instants_and_is_reported(open_reader: Callable) -> None:
    mixture, reader = open_reader(min_gap_fraction=0.4, instants=3, offset_frames=True)
    [part] = mixture.parts
    source, index = part.source, part.index
    nominal, clips = int(index.gap[0]), np.arange(0, len(index), max(1, len(index) // 60))
    batch = read(reader, clips)
    gaps = np.rint(batch["gap"] * 0.5 * source.control_rate[0]).astype(int)
    for row, (clip, gap) in enumerate(zip(clips, gaps, strict=True)):
        first = int(index.first[clip])
        expected = [source.action[first + gap * k : first + gap * (k + 1)].mean(axis=0) for k in range(2)]
        np.testing.assert_allclose(batch["action"][row], expected, rtol=1e-5)
    assert set(gaps.tolist()) == set(range(-(-4 * nominal // 10), nominal + 1))
    samples = reader.filler.draw(np.zeros(1, int), clips[:1], np.random.default_rng(0))
    np.testing.assert_array_equal(np.diff(samples.records)[0], [samples.gap[0]] * 2)


def test_flow_is_that_of_the_augmented_frames(open_reader: Callable) -> None:
    mixture, reader = open_reader(size=32, flow=True, instants=3)
    batch = read(reader, [5], random_shift=4)
    pairs = itertools.pairwise(batch["frames"][0])
    np.testing.assert_array_equal(batch["flow"][0], [optical_flow(first, second) for first, second in pairs])
    assert batch["flow"].shape == (1, 2, 8, 8, 2)


def test_without_flow_and_labels_a_batch_has_none(open_reader: Callable) -> None:
    pairs = to_frame_pairs(read(open_reader()[1], [0]))
    assert pairs.flow is None and pairs.supervision is None and pairs.has_supervision is None


def test_robot_data_with_actions_mixes_with_video_without(
    tabletop_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = Mixture.open([MixtureEntry(str(tabletop_dataset))] * 2, "train", ClipConfig(0.5))
    video = mixture.parts[1].source
    video.action = None
    reader = BatchReader(ClipFiller(mixture, actions=True), 16)
    batch = reader.map(BatchSampler(reader.filler, batch_size=20, seed=0)(0))
    robot = batch["dataset"] == 0
    assert 0 < robot.sum() < 20 and batch["action"].shape == (20, 1, 4)
    assert np.all(batch["has_action"][robot] == 1) and np.any(batch["action"][robot] != 0)
    assert not batch["has_action"][~robot].any() and not batch["action"][~robot].any()


def test_actions_are_normalized_as_the_entry_says(tabletop_dataset: Path) -> None:
    entries = [MixtureEntry(str(tabletop_dataset), normalization=kind) for kind in ("", "min_max")]
    mixture = Mixture.open(entries, "train", ClipConfig(0.5))
    reader = BatchReader(ClipFiller(mixture, actions=True, normalization="mean_std"), 16)
    clips, rng = np.arange(0, len(mixture.parts[0].index), 5), np.random.default_rng(0)
    standard, bounded = (
        reader.map(reader.filler.draw(np.full(len(clips), dataset), clips, rng))["action"] for dataset in (0, 1)
    )
    action = mixture.parts[0].source.action
    np.testing.assert_allclose(
        (standard * action.std(0) + action.mean(0)), (bounded + 1) / 2 * np.ptp(action, 0) + action.min(0), atol=1e-4
    )
    assert np.abs(bounded).max() <= 1.0001
