"""Mixtures, samples and streams, on a dataset of the embedded environment."""

import dataclasses
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from PIL import Image

from como_jax.data import pipeline
from como_jax.data.clips import ClipConfig
from como_jax.data.flow import optical_flow
from como_jax.data.pipeline import ClipLoader, MixtureEntry, parse_mixture
from como_jax.data.sources import EpisodeSource
from como_jax.errors import DatasetError

Batch = dict[str, Any]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", [("a/b", 1.0)]),
        ("a=2, b=0.5 ,c", [("a", 2.0), ("b", 0.5), ("c", 1.0)]),
        ("dir=with=3", [("dir=with", 3.0)]),
    ],
)
def test_a_mixture_names_directories_and_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert [dataclasses.astuple(entry) for entry in parse_mixture(text)] == expected


@pytest.mark.parametrize("text", ["a=", "a=x", "a=0", "a=-1", "a=inf", "a=nan"])
def test_a_weight_that_is_no_positive_number_is_refused(text: str) -> None:
    with pytest.raises(DatasetError, match=f"'{text}': the weight after '=' must be a positive number"):
        parse_mixture(text)


@pytest.mark.parametrize("text", ["", " , "])
def test_an_empty_mixture_is_refused(text: str) -> None:
    with pytest.raises(DatasetError, match="No dataset is named"):
        parse_mixture(text)


@pytest.fixture(scope="module")
def source(tabletop_dataset: Path) -> EpisodeSource:
    return EpisodeSource(tabletop_dataset, "train")


@pytest.fixture(scope="module")
def open_loader(tabletop_dataset: Path) -> Callable[..., tuple[pipeline.Mixture, ClipLoader]]:
    """Opens a mixture of the dataset with the given weights; keyword arguments are those of `ClipConfig`."""

    def make(
        weights: tuple[float, ...] = (1.0,), size: int = 16, shift: int = 0, flow: bool = False, **clips: Any
    ) -> tuple[pipeline.Mixture, ClipLoader]:
        config = ClipConfig(**{"gap_seconds": 0.5, **clips})
        entries = [MixtureEntry(str(tabletop_dataset), weight) for weight in weights]
        mixture = pipeline.open_mixture(entries, "train", config)
        return mixture, ClipLoader(mixture.sources, mixture.indices, config, size, shift, actions=True, flow=flow)

    return make


@pytest.fixture(scope="module")
def stream(open_loader: Callable) -> Callable[..., grain.IterDataset]:
    """Opens a stream of batches; keyword arguments are those of `train_batches` and of `open_loader`."""

    def make(batch_size: int = 4, seed: int = 0, index: int = 0, count: int = 1, **loader: Any) -> grain.IterDataset:
        return pipeline.train_batches(
            *open_loader(**{"shift": 2, **loader}),
            batch_size=batch_size,
            seed=seed,
            num_threads=2,
            num_workers=0,
            process_index=index,
            process_count=count,
        )

    return make


def take(batches: grain.IterDataset, count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def assert_equal(first: Any, second: Any) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_a_sample_holds_the_recorded_frames_a_gap_apart(open_loader: Callable, source: EpisodeSource) -> None:
    mixture, loader = open_loader(size=64, instants=3)
    [index] = mixture.indices
    clip = len(index) // 2
    sample = loader.random_map((0, clip), np.random.default_rng(0))
    first, gap = index.first[clip], index.gap[index.episode[clip]]
    recorded = [np.asarray(Image.open(io.BytesIO(source.read_jpeg(first + k * gap)))) for k in range(3)]
    # Two decoders may round differently.
    np.testing.assert_allclose(sample["frames"].astype(int), np.stack(recorded), atol=2)
    assert sample["episode"] == index.episode[clip]
    start = source.start[sample["episode"]]
    assert start <= first < first + 2 * gap < start + source.length[sample["episode"]]


def test_actions_are_averaged_over_the_gap(open_loader: Callable, source: EpisodeSource) -> None:
    mixture, loader = open_loader(instants=3)
    [index] = mixture.indices
    first, gap = index.first[7], index.gap[index.episode[7]]
    assert gap > 1
    expected = [source.action[t : t + gap].mean(axis=0) for t in (first, first + gap)]
    sample = loader.random_map((0, 7), np.random.default_rng(0))
    np.testing.assert_array_equal(sample["action"], expected)
    assert sample["action"].dtype == np.float32


def test_frames_and_offset_frames_get_the_same_shift(open_loader: Callable) -> None:
    (_, plain), (_, shifting) = open_loader(), open_loader(shift=3)
    still, moved = (loader.random_map((0, 3), np.random.default_rng(2)) for loader in (plain, shifting))
    candidates = [
        (down, right)
        for down, right in itertools.product(range(-3, 4), repeat=2)
        if all(
            np.array_equal(np.roll(still[key], (-down, -right), (1, 2))[:, 3:13, 3:13], moved[key][:, 3:13, 3:13])
            for key in ("frames", "offset_frames")
        )
    ]
    assert len(candidates) == 1
    assert candidates != [(0, 0)]


def test_offset_frames_are_other_frames_than_the_future(open_loader: Callable) -> None:
    mixture, loader = open_loader(size=64)
    samples = [loader.random_map((0, clip), np.random.default_rng(clip)) for clip in range(0, mixture.num_clips, 9)]
    assert all(sample["offset_frames"].shape == (1, 64, 64, 3) for sample in samples)
    assert any(np.any(sample["offset_frames"][0] != sample["frames"][1]) for sample in samples)


def test_a_batch_fits_the_data_contract(stream: Callable) -> None:
    [batch] = take(stream(instants=3), 1)
    pairs = pipeline.to_frame_pairs(batch)
    pairs.check_shapes()
    assert pairs.frames.shape == (4, 3, 16, 16, 3)
    assert batch["action"].shape == (4, 2, 4)


def test_what_is_not_asked_for_is_not_read(stream: Callable) -> None:
    [batch] = take(stream(offset_frames=False), 1)
    assert pipeline.to_frame_pairs(batch).offset_frames is None


def test_a_stream_repeats_by_seed(stream: Callable) -> None:
    assert_equal(take(stream(seed=3), 3), take(stream(seed=3), 3))
    assert any(
        np.any(a["frames"] != b["frames"]) for a, b in zip(stream(seed=3), take(stream(seed=4), 3), strict=False)
    )


def test_epochs_hold_every_clip_once_and_differ_in_order(open_loader: Callable, stream: Callable) -> None:
    num_clips = open_loader()[0].num_clips
    batches = take(stream(batch_size=num_clips, shift=0), 2)
    first, second = (sorted(zip(b["episode"], map(bytes, b["frames"][:, 0]), strict=True)) for b in batches)
    assert first == second
    assert batches[0]["episode"].tolist() != batches[1]["episode"].tolist()


def test_augmentation_differs_between_epochs(open_loader: Callable, stream: Callable) -> None:
    num_clips = open_loader()[0].num_clips
    first, second = ({bytes(clip) for clip in batch["frames"]} for batch in take(stream(batch_size=num_clips), 2))
    assert len(first & second) < num_clips / 2


def test_two_hosts_read_the_stream_of_one(stream: Callable) -> None:
    together = take(stream(batch_size=4), 3)
    hosts = [take(stream(batch_size=2, index=index, count=2), 3) for index in range(2)]
    joined = [
        {key: np.stack([first[key], second[key]], axis=1).reshape(4, *first[key].shape[1:]) for key in first}
        for first, second in zip(*hosts, strict=True)
    ]
    assert_equal(joined, together)


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
    assert_equal([next(resumed) for _ in range(3)], expected)


def test_worker_processes_read_the_same_clips(open_loader: Callable, stream: Callable) -> None:
    mixture, loader = open_loader(shift=2)
    workers = pipeline.train_batches(mixture, loader, batch_size=4, seed=0, num_threads=1, num_workers=2)
    assert_equal(take(workers, 2), take(stream(), 2))


def test_evaluation_covers_a_dataset_evenly_and_fills_up_the_last_batch(open_loader: Callable) -> None:
    mixture, loader = open_loader(offset_frames=False)
    [index] = mixture.indices
    found = list(pipeline.evaluation_batches(index, loader, num_clips=10, batch_size=4))
    assert [count for _, count in found] == [4, 4, 2]
    episodes = np.concatenate([batch["episode"] for batch, _ in found])
    chosen = np.linspace(0, len(index) - 1, 10).astype(int)
    assert episodes.tolist() == [*index.episode[chosen], *[index.episode[-1]] * 2]


def test_hosts_share_the_batches_of_an_evaluation(open_loader: Callable) -> None:
    mixture, loader = open_loader(offset_frames=False)
    [index] = mixture.indices

    def read(**host: int) -> list[Batch]:
        found = pipeline.evaluation_batches(index, loader, num_clips=6, batch_size=4, **host)
        return [batch for batch, _ in found]

    hosts = [read(process_index=index, process_count=2) for index in range(2)]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*hosts, strict=True)]
    assert_equal(joined, read())


def test_a_source_opens_its_files_anew_in_another_process(source: EpisodeSource) -> None:
    jpeg = source.read_jpeg(5)
    assert pickle.loads(pickle.dumps(source)).read_jpeg(5) == jpeg


def test_the_description_says_what_is_in_a_mixture(open_loader: Callable) -> None:
    mixture, _ = open_loader(weights=(3.0, 1.0))
    first, second = mixture.describe()
    assert first.startswith(f"tabletop [train]: 75% of samples, {len(mixture.sources[0].length)} episodes")
    assert "25% of samples" in second
    assert f"{len(mixture.indices[0])} clips, gap 0.5 s, camera image" in first


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


def test_a_record_that_cannot_be_decoded_is_named(open_loader: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    _, loader = open_loader()
    monkeypatch.setattr(EpisodeSource, "read_jpeg", lambda self, record: b"damaged")
    with pytest.raises(DatasetError, match=r"\(train\): record 0, camera 'image', cannot be decoded"):
        loader.random_map((0, 0), np.random.default_rng(0))


def test_a_drawn_gap_spaces_the_instants_and_is_reported(open_loader: Callable) -> None:
    mixture, loader = open_loader(min_gap_fraction=0.4, instants=3, offset_frames=True)
    source, index = mixture.sources[0], mixture.indices[0]
    nominal, rate, seen = int(index.gap[0]), source.control_rate[0], set()
    for clip in range(0, len(index), max(1, len(index) // 60)):
        sample = loader.random_map((0, clip), np.random.default_rng(clip))
        gap = round(float(sample["gap"]) * 0.5 * rate)
        first = int(index.first[clip])
        frames = [loader._frame(source, first + gap * k) for k in range(3)]
        np.testing.assert_array_equal(sample["frames"], frames)
        expected = [source.action[first + gap * k : first + gap * (k + 1)].mean(axis=0) for k in range(2)]
        np.testing.assert_allclose(sample["action"], expected, rtol=1e-5)
        seen.add(gap)
    assert seen == set(range(-(-4 * nominal // 10), nominal + 1))


def test_flow_is_that_of_the_augmented_frames(open_loader: Callable) -> None:
    _, loader = open_loader(size=32, shift=4, flow=True, instants=3)
    sample = loader.random_map((0, 5), np.random.default_rng(0))
    pairs = itertools.pairwise(sample["frames"])
    np.testing.assert_array_equal(sample["flow"], [optical_flow(first, second) for first, second in pairs])
    assert sample["flow"].shape == (2, 8, 8, 2)


def test_without_flow_and_labels_a_batch_has_none(open_loader: Callable) -> None:
    _, loader = open_loader()
    pairs = pipeline.to_frame_pairs(loader.random_map((0, 0), np.random.default_rng(0)))
    assert pairs.flow is None and pairs.labels is None and pairs.labelled is None
