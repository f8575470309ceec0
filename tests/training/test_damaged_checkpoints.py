"""Checkpoints that are cut off, garbled or gone: the one before serves, and nothing is lost or hidden."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import chex
import grain
import jax.numpy as jnp
import pytest

from como_jax.errors import RunError
from como_jax.training import checkpoint
from como_jax.training.checkpoint import Checkpointer
from como_jax.training.train_state import TrainState


def make_state(step: int) -> TrainState:
    value = jnp.arange(4096, dtype=jnp.float32) * step
    return TrainState(jnp.int32(step), {"w": value, "b": {"c": value[:3]}}, {}, (), None)


def make_iterator() -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(100).to_iter_dataset())


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """Steps 1 and 2 are saved, after as many batches."""
    checkpointer, iterator = Checkpointer(tmp_path), make_iterator()
    for step in (1, 2):
        next(iterator)
        checkpointer.save(step, make_state(step), iterator)
    checkpointer.close()
    return tmp_path


def cut_off_arrays(step: Path) -> None:
    found = [path for path in (step / "state").rglob("*") if path.is_file() and path.parent.name == "d"]
    assert found
    for path in found:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_arrays(step: Path) -> None:
    for path in (step / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.unlink()


def lose_metadata(step: Path) -> None:
    (step / "state" / "_METADATA").unlink()


def cut_off_metadata(step: Path) -> None:
    path = step / "state" / "_METADATA"
    path.write_text(path.read_text()[:50])


def empty_position(step: Path) -> None:
    for path in (step / "data").glob("process*"):
        path.write_text("")


def lose_position(step: Path) -> None:
    for path in (step / "data").glob("process*"):
        path.unlink()


OF_STATE = [cut_off_arrays, lose_arrays, lose_metadata, cut_off_metadata]


@pytest.mark.parametrize("damage", [*OF_STATE, empty_position, lose_position])
def test_the_one_before_is_taken_and_named(
    workdir: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(workdir / "checkpoints" / "2")
    checkpointer, iterator = Checkpointer(workdir), make_iterator()
    with caplog.at_level(logging.WARNING, "como_jax"):
        restored = checkpointer.restore(make_state(7), iterator)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "damaged, step 2" in said and "Taking the checkpoint of step 1 instead" in said
    assert int(restored.step) == 1
    chex.assert_trees_all_equal(restored, make_state(1))
    assert next(iterator) == 1
    # What is left of the damaged one is put aside, and the run can save its step again.
    assert (workdir / "damaged_checkpoints" / "2").is_dir() and checkpointer.latest_step() == 1
    checkpointer.save(2, make_state(2), iterator)
    checkpointer.close()
    assert int(Checkpointer(workdir).restore(make_state(7), make_iterator()).step) == 2


@pytest.mark.parametrize("damage", OF_STATE)
def test_readers_of_parameters_take_the_one_before_too(workdir: Path, damage: Callable[[Path], None]) -> None:
    damage(workdir / "checkpoints" / "2")
    step, params = checkpoint.load_newest(workdir, make_state(7).params)
    assert step == 1
    chex.assert_trees_all_equal(params, make_state(1).params)
    matched = checkpoint.load_matching_params(workdir, make_state(7).params)
    chex.assert_trees_all_equal(matched.params, make_state(1).params)
    assert (workdir / "checkpoints" / "2").exists()


def test_where_none_can_be_read_nothing_is_moved_and_the_reason_is_said(workdir: Path) -> None:
    for step in "12":
        cut_off_arrays(workdir / "checkpoints" / step)
    checkpointer = Checkpointer(workdir)
    with pytest.raises(RunError, match=r"No checkpoint in .*checkpoints can be read; step 2: .*; step 1: "):
        checkpointer.restore(make_state(7), make_iterator())
    checkpointer.close()
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]


def test_a_checkpoint_of_another_model_is_not_taken_for_a_damaged_one(workdir: Path) -> None:
    checkpointer, other = Checkpointer(workdir), make_state(7)
    other = TrainState(other.step, {**other.params, "w": other.params["w"][:5]}, {}, (), None)
    with pytest.raises(RunError, match=r"w is \(4096,\) there and \(5,\) here"):
        checkpointer.restore(other, make_iterator())
    checkpointer.close()


def test_what_a_killed_save_leaves_is_no_checkpoint(workdir: Path) -> None:
    half = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    checkpointer = Checkpointer(workdir)
    assert checkpointer.latest_step() == 2
    checkpointer.save(3, make_state(3), make_iterator())
    checkpointer.close()
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "3"]


def test_a_step_before_the_newest_is_not_dropped_in_silence(workdir: Path) -> None:
    checkpointer = Checkpointer(workdir)
    with pytest.raises(RunError, match="has a checkpoint of step 2, so that step 1 cannot be saved"):
        checkpointer.save(1, make_state(1), make_iterator())
    checkpointer.close()
