"""Directories of rollouts: a new one for each, or that of the same rollouts which a kill or Ctrl-C has stopped."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from como_jax.errors import RunError
from como_jax.evaluation.rollouts.results import EPISODES_NAME, EpisodeResult
from como_jax.files import write_json
from como_jax.staging import is_local

PLAN_NAME = "unfinished.json"
_MAX_NAME = 80


@contextlib.contextmanager
def rollout_directory(
    out: epath.PathLike | None, parent: epath.Path, name: str, plan: Mapping[str, Any]
) -> Iterator[epath.Path]:
    """The directory of some rollouts: `out`, or by default one in `parent` that is named after `name`.

    It is a new one unless the same rollouts were stopped there, as its file `unfinished.json` says until they have
    ended. It is removed if no other file was written to it.

    Args:
      out, parent, name: see above.
      plan: what JSON can hold; equal plans are the same rollouts.

    Raises:
      RunError: it cannot be made, or `out` holds files of something else already.
    """
    with contextlib.ExitStack() as stack:
        path = _unfinished(stack, _candidates(out, parent, name), plan)
        if path is None:
            path = epath.Path(out) if out is not None else _unused(parent, name)
            _make(path, out is not None)
            write_json(path / PLAN_NAME, plan)
            _lock(stack, path)
        try:
            yield path
        except BaseException:
            if [each.name for each in path.iterdir()] == [PLAN_NAME]:
                (path / PLAN_NAME).unlink()
                path.rmdir()
            raise
        (path / PLAN_NAME).unlink()


def read_episodes(directory: epath.Path) -> list[EpisodeResult]:
    """The episodes that have ended in a directory up to now, those that crashed included.

    Raises:
      RunError: the list of episodes is damaged.
    """
    path = directory / EPISODES_NAME
    if not path.exists():
        return []
    try:
        return [
            EpisodeResult(
                row["task"], int(row["episode"]), int(row["seed"]), row["instruction"], int(row["steps"]),
                bool(int(row["success"])), row["reason"],
            )
            for row in csv.DictReader(io.StringIO(path.read_text()))
        ]  # fmt: skip
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise RunError(f"{path} is damaged ({error}); delete {directory} to begin anew.") from error


def _make(path: epath.Path, may_exist: bool) -> None:
    try:
        path.mkdir(parents=True, exist_ok=may_exist)
    except OSError as error:
        raise RunError(f"`out` {path} cannot be made: {error}") from error
    if any(path.iterdir()):
        raise RunError(f"`out` {path} holds files already; choose another or empty it.")


def _unfinished(stack: contextlib.ExitStack, paths: Iterator[epath.Path], plan: Mapping[str, Any]) -> epath.Path | None:
    """The first path at which the same rollouts were stopped, and no other process goes on with them."""
    wanted = json.loads(json.dumps(plan))
    for path in paths:
        try:
            found = json.loads((path / PLAN_NAME).read_text())
        except (OSError, ValueError):
            continue
        if found == wanted and _lock(stack, path):
            return path
    return None


def _lock(stack: contextlib.ExitStack, path: epath.Path) -> bool:
    """Takes a directory for this process, as long as it lives; False if another has it. Buckets know no locks."""
    if not is_local(path):
        return True
    file = stack.enter_context((path / PLAN_NAME).open())
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _candidates(out: epath.PathLike | None, parent: epath.Path, name: str) -> Iterator[epath.Path]:
    if out is not None:
        yield epath.Path(out)
        return
    for path in _numbered(parent, name):
        if not path.exists():
            return
        yield path


def _unused(parent: epath.Path, name: str) -> epath.Path:
    """The first path of a name that does not exist yet."""
    return next(path for path in _numbered(parent, name) if not path.exists())


def _numbered(parent: epath.Path, name: str) -> Iterator[epath.Path]:
    """The paths in `parent` that are named after `name`."""
    stem, number = re.sub(r"[^\w.-]+", "-", name), 1
    if len(stem) > _MAX_NAME:
        stem = f"{stem[: _MAX_NAME // 2]}...{stem[-_MAX_NAME // 2 :]}"
    while True:
        yield parent / (stem if number == 1 else f"{stem}-{number}")
        number += 1
