"""A folder that appears when it is complete."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

from etils import epath

from como_jax.errors import OutputError
from como_jax.staging import is_local


@contextlib.contextmanager
def new_folder(out: epath.PathLike, workdir: epath.PathLike) -> Iterator[epath.Path]:
    """Gives a temporary folder beside `out`, and renames it to `out` if all goes well; removes it otherwise.

    Raises:
      OutputError: `out` is in the way, the run itself, or cannot be made.
    """
    if not is_local(out):
        raise OutputError(f"--out {out} must be a folder of this machine; copy it to the bucket afterwards.")
    target = epath.Path(out).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"--out {out} exists already; remove it or choose another folder.")
    if epath.Path(workdir).expanduser().resolve().is_relative_to(target):
        raise OutputError(f"--out {out} holds the run --workdir {workdir}; choose a folder elsewhere.")
    partial = target.with_name(f".{target.name}.new-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"--out {out} cannot be made: {error.strerror or error}.") from error
    try:
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        partial.rmtree(missing_ok=True)
        raise
