"""The ways to write shards: all give the same bytes, and all say what went wrong."""

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from fake_builder import FakeBuilder, FakeSettings

from como_jax.convert.builder import ConversionError
from como_jax.convert.runners import _sendable, run_here, run_in_processes, run_on_beam

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


def test_a_killed_process_is_named_with_its_source_and_the_others_are_kept(tmp_path):
    stop = tmp_path / "stop"
    stop.touch()
    behaviours = ("good",) * 13 + ("kills",)
    settings = FakeSettings(behaviours=behaviours, stop_file=str(stop), validation_fraction=0)
    with pytest.raises(ConversionError) as error:
        FakeBuilder(tmp_path / "out", settings).convert(runner=two_processes)
    assert str(error.value) == (
        "a process was killed while it converted 13_kills, probably because memory ran out; try fewer `processes`"
    )
    assert error.value.__notes__[0].endswith("; the same command goes on from there")
    stop.unlink()
    FakeBuilder(tmp_path / "out", settings).convert()
    FakeBuilder(tmp_path / "expected" / "out", settings).convert()
    assert contents(tmp_path / "out") == contents(tmp_path / "expected" / "out")


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
