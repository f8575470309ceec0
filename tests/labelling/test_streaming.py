"""Labels of whole episodes: equal to those of single pairs, wherever batches and episodes begin and end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from como_jax.data.clips import ClipConfig, gap_steps
from como_jax.data.mixture import Mixture, MixtureEntry
from como_jax.data.motion_data import ClipFiller
from como_jax.data.reader import BatchReader
from como_jax.labelling.streaming import StreamLabeller, single_frames, steps_back
from como_jax.nn.model_def import ModelDef
from como_jax.spec.motion import BottleneckConfig
from como_jax.training import sharding

SIZE, EPISODES = 16, 4


@pytest.fixture(scope="module")
def reader(tabletop_dataset: Path) -> BatchReader:
    mixture = Mixture.open([MixtureEntry(str(tabletop_dataset))], "train", ClipConfig(0.5))
    return BatchReader(ClipFiller(mixture), SIZE)


@pytest.fixture(scope="module")
def source(reader: BatchReader) -> Any:
    return reader.filler.parts[0].source


def place(model: ModelDef, mesh: Any) -> Any:
    return jax.device_put(jax.jit(model.init)(jax.random.key(0)), sharding.replicated(mesh))


def label(model: ModelDef, reader: BatchReader, source: Any, gap: np.ndarray, batch_size: int, mesh: Any) -> Any:
    labeller = StreamLabeller(model, place(model, mesh), mesh, batch_size=batch_size, max_gap=int(gap.max()))
    lengths = source.length[:EPISODES]
    steps = np.arange(lengths.sum())
    return labeller(reader, np.repeat(np.arange(EPISODES), lengths), steps, steps_back(lengths, gap))


def test_steps_back_stay_within_their_episode() -> None:
    assert steps_back(np.array([4, 2, 3]), np.array([2, 3, 1])).tolist() == [0, 0, 2, 2, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("batch_size", [8, 64])
def test_labels_are_those_of_single_pairs_and_masked_at_the_end(
    make_como: Callable[..., ModelDef], reader: BatchReader, source: Any, batch_size: int
) -> None:
    model, mesh = make_como(bottleneck=BottleneckConfig("vq", 8)), sharding.make_mesh()
    gap = gap_steps(0.5, source.control_rate[:EPISODES])
    found = label(model, reader, source, gap, batch_size, mesh)
    params = place(model, mesh)
    encode = jax.jit(lambda params, frames: (model.bind(params).encode(frames), model.bind(params).codes(frames)))
    for episode in range(EPISODES):
        start, length, step = source.start[episode], source.length[episode], int(gap[episode])
        valid = found.valid[start : start + length]
        assert valid.tolist() == [t + step < length for t in range(length)]
        assert not found.latent[start : start + length][~valid].any()
        assert np.all(found.codes[start : start + length][~valid] == -1)
        chosen = np.arange(start, start + length - step)[:: max(1, length // 8)]
        pairs = [reader.decode(single_frames(chosen * 0, chosen + shift))[0][:, 0, 0] for shift in (0, step)]
        latent, codes = encode(params, np.stack(pairs, axis=1))
        np.testing.assert_allclose(found.latent[chosen], latent[:, 0], atol=1e-5)
        np.testing.assert_array_equal(found.codes[chosen], codes[:, 0])


@pytest.mark.slow
def test_episodes_may_differ_in_their_gaps(
    make_como: Callable[..., ModelDef], reader: BatchReader, source: Any
) -> None:
    model, mesh = make_como(), sharding.make_mesh()
    short, long, mixed = (
        label(model, reader, source, np.array(gap), 16, mesh) for gap in ([2] * 4, [5] * 4, [2, 5, 2, 5])
    )
    border = np.cumsum(source.length[:EPISODES])
    for episode, expected in enumerate((short, long, short, long)):
        rows = slice(border[episode] - source.length[episode], border[episode])
        np.testing.assert_allclose(mixed.latent[rows], expected.latent[rows], atol=1e-5)


def test_every_frame_is_read_once(
    make_como: Callable[..., ModelDef], reader: BatchReader, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    read = type(source).read_cameras
    monkeypatch.setattr(type(source), "read_cameras", lambda self, *given: seen.extend(given[0]) or read(self, *given))
    label(make_como(), reader, source, np.full(EPISODES, 4), 32, sharding.make_mesh())
    steps = int(source.length[:EPISODES].sum())
    assert sorted(seen) == list(range(steps))
