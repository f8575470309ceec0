"""What all commands share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

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
