"""Where the records of a shard go, and what happens when they cannot."""

import resource
import signal

import pytest
from fake_builder import FakeBuilder, FakeSettings

from como_jax.convert import shards


def test_a_bucket_gets_the_records_that_a_file_system_gets(tmp_path, monkeypatch):
    FakeBuilder(tmp_path / "local" / "out", FakeSettings()).convert()
    monkeypatch.setattr(shards, "is_local", lambda path: False)
    FakeBuilder(tmp_path / "bucket" / "out", FakeSettings()).convert()
    for path in (tmp_path / "local" / "out").iterdir():
        assert (tmp_path / "bucket" / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_full_disk_is_an_error_of_the_system_and_leaves_no_half_file(tmp_path):
    settings = FakeSettings(behaviours=("good",) * 6, validation_fraction=0)
    builder = FakeBuilder(tmp_path / "out", settings)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # The second shard has half the sources, so that the first alone is too large.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(OSError, match="cannot write records: .*File too large"):
            builder.convert()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not any(tmp_path.iterdir())
