"""What all commands share."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from absl.testing import flagsaver
from ml_collections import ConfigDict

from como_jax import cli


@pytest.fixture
def cache() -> Iterator[str]:
    """The folder that the tests' own programs are kept in, again afterwards."""
    directory = jax.config.jax_compilation_cache_dir
    yield directory
    jax.config.update("jax_compilation_cache_dir", directory)


def test_a_folder_for_compiled_programs_is_taken_where_one_is_given(cache: str, tmp_path: Path) -> None:
    cli.keep_programs(None)
    assert jax.config.jax_compilation_cache_dir == cache
    cli.keep_programs(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_fields_in_messages_become_the_flags_of_the_command() -> None:
    message = "`compilation_cache` and `latent_dim` are too large"
    assert cli.name_flags(message) == "--compilation_cache and `latent_dim` are too large"


def test_a_full_disk_is_known_by_its_text_whatever_the_error() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")
    assert cli.full_disk(full) == "[Errno 28] No space left on device: '/disk/file'"
    assert "quota" in cli.full_disk(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))
    # As TensorStore says it.
    assert cli.full_disk(ValueError("RESOURCE_EXHAUSTED: Failed to write\n 9 bytes: No space left on device [28]"))
    led = RuntimeError("the writer has failed")
    led.__cause__ = full
    assert cli.full_disk(led) == cli.full_disk(full)
    assert cli.full_disk(OSError(errno.EIO, os.strerror(errno.EIO))) == cli.full_disk(ValueError("no space")) == ""


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.app, "run", lambda main, **_: main(["command"]))
    # It would keep the log from later tests.
    monkeypatch.setattr(cli, "_log_plainly", lambda: None)

    def fail(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SystemExit) as stopped, flagsaver.flagsaver(compilation_cache=None):
        cli.run(fail)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: the disk is full: [Errno 28] No space left on device\n"
    with pytest.raises(KeyError):
        cli.run(lambda _: {}["missing"])


CONFIG = ConfigDict(
    {"seed": 0, "optim": {"learning_rate": 1.0}, "model": {"latent_dim": 3, "bottleneck": {"kind": ""}}}
)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("model.latent_dmi", "no field 'model.latent_dmi'; did you mean 'model.latent_dim'?"),
        ("modle.latent_dim", "no field 'modle.latent_dim'; did you mean 'model.latent_dim'?"),
        ("kind", "no field 'kind'; did you mean 'model.bottleneck.kind'?"),
        ("optim.lr", "no field 'optim.lr'; config.optim has learning_rate."),
        ("zzz", "no field 'zzz'; config has model, optim, seed."),
        ("seed.first", "config.seed is a value, and has no field 'first'."),
    ],
)
def test_a_field_that_is_not_there_is_named_with_what_is(field: str, message: str) -> None:
    assert message in cli.unknown_field(CONFIG, field)


@pytest.mark.parametrize("field", ["seed", "optim", "model.bottleneck.kind"])
def test_a_field_that_is_there_is_fine(field: str) -> None:
    assert cli.unknown_field(CONFIG, field) == ""
