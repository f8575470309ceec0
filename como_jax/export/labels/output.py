"""A folder that appears when it is complete."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

from etils import epath

from como_jax.errors import OutputError
from como_jax.staging import is_local

# One of them lies in every dataset, of whatever format.
_MARKS = ("dataset_info.json", "meta/info.json")


@contextlib.contextmanager
def new_folder(out: epath.PathLike, source: epath.PathLike, overwrite: bool) -> Iterator[epath.Path]:
    """Gives a temporary folder beside `out`, and renames it to `out` if all goes well; removes it otherwise.

    Args:
      out: the folder to be made.
      source: a folder that is read meanwhile, and must neither contain `out` nor lie in it.
      overwrite: replace a dataset that exists already.

    Raises:
      OutputError: `out` is in the way, in or around `source`, or cannot be made.
    """
    if not is_local(out):
        raise OutputError(f"--out {out} must be a folder of this machine; copy it to the bucket afterwards")
    target = epath.Path(out).expanduser().resolve()
    _check(target, epath.Path(source).expanduser().resolve(), overwrite)
    partial, replaced = (target.with_name(f".{target.name}.{part}-{uuid.uuid4().hex[:8]}") for part in ("new", "old"))
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror or error}") from error
    try:
        yield partial
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    except BaseException:
        partial.rmtree(missing_ok=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    if replaced.exists():
        replaced.rmtree()


def _check(out: epath.Path, source: epath.Path, overwrite: bool) -> None:
    if out.is_relative_to(source) or source.is_relative_to(out):
        raise OutputError(f"--out {out} and --data {source} lie in each other; choose a folder elsewhere")
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} exists already and is not a directory")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{out} exists already; --overwrite replaces it")
    if not any((out / mark).exists() for mark in _MARKS):
        raise OutputError(f"{out} is not a dataset, so --overwrite will not replace it")
