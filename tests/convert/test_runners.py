"""The ways to write shards: all give the same bytes, and all say what went wrong."""

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from fake_builder import FakeBuilder, FakeSettings

from como_jax.convert import runners
from como_jax.convert.builder import ConversionError
from como_jax.convert.runners import _Job, _sendable, run_here, run_in_processes, run_on_beam
from como_jax.convert.sources import Shard, Source

two_processes = functools.partial(run_in_processes, count=2)
needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="apache_beam is not installed (pip install apache-beam)"
)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def expected(tmp_path) -> dict[str, bytes]:
    FakeBuilder(tmp_path / "expected" / "out", FakeSettings()).convert(runner=run_here)
    return contents(tmp_path / "expected" / "out")


def test_processes_write_the_same_bytes(tmp_path, expected):
    FakeBuilder(tmp_path / "out", FakeSettings()).convert(runner=two_processes)
    assert contents(tmp_path / "out") == expected


@needs_beam
@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["--direct_running_mode=multi_processing", "--direct_num_workers=2"], marks=pytest.mark.slow),
    ],
)
def test_beam_writes_the_same_bytes(tmp_path, expected, options, monkeypatch):
    # Beam's own worker processes find the builder's module by this.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    runner = functools.partial(run_on_beam, runner="DirectRunner", options=options)
    FakeBuilder(tmp_path / "out", FakeSettings()).convert(runner=runner)
    assert contents(tmp_path / "out") == expected


@needs_beam
def test_beam_goes_on_where_this_machine_stopped(tmp_path):
    stop = tmp_path / "stop"
    stop.touch()
    settings = FakeSettings(behaviours=("good",) * 9 + ("stops",), stop_file=str(stop), validation_fraction=0)
    with pytest.raises(KeyboardInterrupt):
        FakeBuilder(tmp_path / "out", settings).convert()
    stop.unlink()
    finished = tmp_path / "out.partial" / "dataset" / "out-train.array_record-00000-of-00003"
    inode = finished.stat().st_ino
    FakeBuilder(tmp_path / "out", settings).convert(
        runner=functools.partial(run_on_beam, runner="DirectRunner", options=[])
    )
    assert (tmp_path / "out" / finished.name).stat().st_ino == inode
    FakeBuilder(tmp_path / "expected" / "out", settings).convert()
    assert contents(tmp_path / "out") == contents(tmp_path / "expected" / "out")


def test_a_missing_beam_is_named_with_the_way_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ConversionError, match=r"needs Apache Beam .*; install it with: pip install 'como_jax\[beam\]'"):
        FakeBuilder(tmp_path / "out", FakeSettings()).convert(
            runner=functools.partial(run_on_beam, runner="DirectRunner", options=[])
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_source_at_which_processes_die_costs_itself_alone(tmp_path):
    settings = FakeSettings(behaviours=(*("good",) * 5, "kills", *("good",) * 4), validation_fraction=0)
    report = FakeBuilder(tmp_path / "out", settings).convert(runner=two_processes)
    how = "by SIGKILL, probably because memory ran out (fewer processes need less)"
    reason = f"two processes ended {how} while they converted it"
    assert report["left_out"] == [{"source": "05_kills", "reasons": [reason]}]
    assert report["sources"]["converted"] == 9 and report["episodes"]["train"] == 18


def test_a_process_that_dies_once_costs_nothing(tmp_path):
    once = tmp_path / "once"
    once.touch()
    settings = FakeSettings(behaviours=("good",) * 7 + ("kills once",), validation_fraction=0, stop_file=str(once))
    report = FakeBuilder(tmp_path / "out", settings).convert(runner=two_processes)
    assert not once.exists() and report["left_out"] == [] and report["episodes"]["train"] == 16
    FakeBuilder(tmp_path / "expected" / "out", settings).convert(runner=run_here)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected" / "out")


def test_deaths_without_a_source_to_blame_end_the_conversion():
    job = _Job(Shard("train", 0, 1, (Source("a"), Source("b"))))
    job.note_death(1, "by signal 11")
    job.note_death(2, "by signal 9")
    assert not job.lost
    job.note_death(1, "with status 1")
    assert job.lost == {"b": "two processes ended with status 1 while they converted it"}
    with pytest.raises(ConversionError, match="^two processes ended by signal 9 when they had converted shard train-0"):
        job.note_death(2, "by signal 9")


def test_processes_that_cannot_start_end_the_conversion(tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "_work", os._exit)
    # An exit code that is no number is 1, like that of a process that cannot import the builder.
    with pytest.raises(ConversionError, match="^a process ended with status 1 before it could convert anything$"):
        FakeBuilder(tmp_path / "out", FakeSettings()).convert(runner=two_processes)
    assert not any(tmp_path.iterdir())


def test_a_mistake_in_a_builder_comes_back_from_its_process(tmp_path):
    settings = FakeSettings(behaviours=("bug",) * 8, validation_fraction=0)
    with pytest.raises(TypeError, match="a mistake in the builder") as error:
        FakeBuilder(tmp_path / "out", settings).convert(runner=two_processes)
    assert "fake_builder.py" in error.value.__notes__[0]
    assert not any(tmp_path.iterdir())


def test_a_full_disk_in_a_process_is_one_line(tmp_path):
    full = _sendable(OSError(28, "No space left on device", "records"))
    assert isinstance(full, OSError) and str(full) == "[Errno 28] No space left on device: 'records'"
    for error in (full, _sendable(ConversionError("no such key")), _sendable(KeyboardInterrupt())):
        assert not hasattr(error, "__notes__")
    assert "in a worker process" in _sendable(TypeError("a mistake")).__notes__[0]


def test_the_number_of_processes_is_checked(tmp_path):
    with pytest.raises(ConversionError, match="processes must be 1 or more, got 0"):
        FakeBuilder(tmp_path / "out", FakeSettings()).convert(runner=functools.partial(run_in_processes, count=0))
