"""Files of a run: metrics that survive a kill, and files that are whole or absent."""

import errno
import json
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from como_jax.files import write_atomic, write_text
from como_jax.training.writers import MetricWriter


def read_metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write_steps(workdir: Path, resume_step: int, steps: range) -> None:
    writer = MetricWriter(workdir, resume_step)
    for step in steps:
        writer.scalars(step, {"train/loss": 1.0 / step})
    writer.close()


def test_resuming_drops_the_metrics_after_the_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 6))
    write_steps(tmp_path, 2, range(3, 5))
    assert read_metrics(tmp_path) == [{"step": step, "train/loss": 1.0 / step} for step in (1, 2, 3, 4)]


def test_resuming_drops_a_line_that_a_kill_left_unfinished(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tra')
    write_steps(tmp_path, 5, range(6, 7))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 6]


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, 0)
    writer.scalars(1, {"a": float("nan"), "b": float("inf"), "c": np.float32(0.5)})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 0.5}]


def read_board(workdir: Path) -> list[Event]:
    [path] = (workdir / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:
        # Length and its checksum, the event and its checksum.
        (length,) = struct.unpack_from("<Q", content)
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_the_board_has_what_was_written_even_without_an_end(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, 5)
    writer.scalars(6, {"train/loss": 0.5, "train/psnr": 20.0})
    writer.image(6, "eval/grid", np.zeros((4, 6, 3), np.uint8))
    begin, start, *shown = read_board(tmp_path)
    assert begin.file_version == "brain.Event:2"
    # What an earlier run wrote from this step on is not shown any more.
    assert (start.step, start.session_log.status) == (6, SessionLog.START)
    values = [(event.step, value.tag) for event in shown for value in event.summary.value]
    assert values == [(6, "train/loss"), (6, "train/psnr"), (6, "eval/grid")]
    assert [event.summary.value[0].simple_value for event in shown[:2]] == [0.5, 20.0]
    assert (shown[2].summary.value[0].image.height, shown[2].summary.value[0].image.width) == (4, 6)


def test_a_full_disk_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricWriter(tmp_path, 0)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(EventsWriter, "flush", fail)
    with pytest.raises(OSError, match="No space left"):
        writer.scalars(1, {"train/loss": 0.5})


def test_a_image_is_written_as_it_is(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    writer = MetricWriter(tmp_path, 0)
    writer.image(12, "eval_val/grid", image)
    writer.close()
    [path] = (tmp_path / "images").iterdir()
    assert path.name == "eval_val_grid_0000012.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomic(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_replaces_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    write_text(tmp_path / "file", "né")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "né"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
