"""What a labelled dataset's latents are held against, and what is said of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from como_jax.data.mixture import MixtureEntry
from como_jax.data.sources import EpisodeSource
from como_jax.errors import DatasetError
from como_jax.evaluation.latents import drift as drifts
from como_jax.evaluation.latents.drift import FAR, LIKE, SHIFTED, UNKNOWN, Drift
from como_jax.evaluation.latents.statistics import LatentStatistics
from como_jax.labelling.shards import label_sums, list_shards
from como_jax.training.run import Run
from tests.export.conftest import change_tables
from tests.labelling.conftest import GAP_SECONDS, label

SIZE = 4
SETTINGS = {"gap_seconds": GAP_SECONDS, "camera": "", "fit": "crop"}


@pytest.fixture
def own_run(run: Run, tmp_path: Path) -> Run:
    """The run in a directory that is not shared."""
    shutil.copytree(run.workdir, tmp_path / "run", ignore=shutil.ignore_patterns("latent_statistics*"))
    return run._replace(workdir=epath.Path(tmp_path / "run"))


def refuse(*unused: Any) -> None:
    raise DatasetError("no frames here")


@pytest.fixture
def held_against_gaussian(
    own_run: Run, tabletop_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Drift]:
    """Compares made-up latents of the demonstrations with a training of a Gaussian."""
    training = np.random.default_rng(0).normal(size=(20_000, SIZE)).astype(np.float32)
    statistics = LatentStatistics.measure(training).to_json()
    (own_run.workdir / f"latent_statistics_{own_run.step}.json").write_text(statistics)
    monkeypatch.setattr(drifts, "sample_transitions", refuse)

    def compare(change: Callable[[np.ndarray], np.ndarray], num_shards: int | None = None) -> Drift:
        directory, rng = epath.Path(tmp_path / "data"), np.random.default_rng(1)
        shutil.copytree(tabletop_dataset, directory)

        def made_up(row: dict[str, Any]) -> dict[str, Any]:
            steps = row["num_steps"]
            # What is not valid would be seen at once.
            latent = np.full((steps, SIZE), 1e6, np.float32)
            latent[:-3] = change(rng.normal(size=(steps - 3, SIZE)))
            return {
                **row,
                "latent_motion": latent.tolist(),
                "latent_valid": [step < steps - 3 for step in range(steps)],
            }

        change_tables(tmp_path / "data", made_up)
        shards = list_shards(directory)[:num_shards]
        return drifts.measure_drift(own_run, directory, label_sums(directory, shards), **SETTINGS)[1]

    return compare


@pytest.mark.parametrize(
    ("change", "verdicts"),
    [
        (lambda latent: latent, {LIKE}),
        (lambda latent: latent * 3.0, {FAR}),
        (lambda latent: latent + 0.5, {SHIFTED}),
        (lambda latent: latent * [1.0, 0.1, 1.0, 2.0], {SHIFTED, FAR}),
    ],
    ids=["the same", "scaled", "moved", "reshaped"],
)
def test_the_verdict_is_that_of_what_was_done_to_the_latents(
    change: Callable[[np.ndarray], np.ndarray], verdicts: set[str], held_against_gaussian: Callable[..., Drift]
) -> None:
    drift = held_against_gaussian(change)
    assert drift.verdict in verdicts
    assert drift.as_report()["advice"] == drift.advice


def test_a_few_episodes_are_too_few_to_tell(held_against_gaussian: Callable[..., Drift]) -> None:
    assert held_against_gaussian(lambda latent: latent, num_shards=1).verdict == UNKNOWN


def test_all_valid_latents_of_both_splits_count(
    held_against_gaussian: Callable[..., Drift], tabletop_dataset: Path
) -> None:
    sources = [EpisodeSource(tabletop_dataset, split) for split in ("train", "val")]
    assert held_against_gaussian(lambda latent: latent).count == sum(
        len(source) - 3 * len(source.length) for source in sources
    )


def test_statistics_of_training_are_measured_once_a_checkpoint(own_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = drifts.reference_statistics(own_run)
    assert first.moments.count > 100 and -1.0 <= first.s_pcfc <= 1.0
    monkeypatch.setattr(drifts, "sample_transitions", refuse)
    np.testing.assert_array_equal(drifts.reference_statistics(own_run).moments.mean, first.moments.mean)
    with pytest.raises(DatasetError, match="no frames here"):
        drifts.reference_statistics(own_run._replace(step=own_run.step + 1))


def test_sampled_latents_are_those_of_the_labels(run: Run, tabletop_dataset: Path, tmp_path: Path) -> None:
    label(run, tabletop_dataset, tmp_path / "labelled")
    labelled = epath.Path(tmp_path / "labelled")
    entry = MixtureEntry(str(labelled))
    sampled = drifts.sample_transitions(run, [entry], GAP_SECONDS, "", "crop", 64).sums
    source = EpisodeSource(labelled, "train")
    assert len(sampled.sample) == 64
    records = sampled.sample_records.astype(np.int64)
    np.testing.assert_allclose(sampled.sample, source.latent_motion[records], rtol=1e-4, atol=1e-5)
    new = label_sums(labelled, list_shards(labelled))
    reference, drift = drifts.measure_drift(run, labelled, new, **SETTINGS)
    assert drift.verdict in (LIKE, UNKNOWN) and drift.s_pcfc is not None
    drifts.drift_figure(reference, new, drift.s_pcfc).canvas.draw()


def test_a_run_directory_that_cannot_be_written_only_costs_time(
    own_run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*unused: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(drifts, "write_text", read_only)
    assert drifts.reference_statistics(own_run).moments.count > 100
    assert "measured again next time" in caplog.text
