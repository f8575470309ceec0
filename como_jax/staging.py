"""The staging folder, in which an output directory is made part by part, so that a killed command can go on.

OUT.partial/plan.json     what is being made: only a command with the same plan goes on with it
OUT.partial/lock          held by the running process; the system frees it when the process ends or is killed
OUT.partial/done/         one file for each finished part, written after all files of the part
OUT.partial/dataset/      what becomes OUT
OUT.partial/parts/        what is joined to files of OUT in the end, such as the episode table of each shard
OUT.partial/replaced/     the older OUT, while the new one takes its place

What may be overwritten is decided here alone: by `check_apart`, `check_output`, and `Staging.publish`. It is what this
project made, as `como_jax.ownership` knows, and nothing that is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from como_jax.errors import OutputError
from como_jax.files import write_json
from como_jax.ownership import MARK, is_made_here, listing, mark_all, strangers

_MAX_SHOWN = 60
_EXISTS = "{} exists already; `overwrite` replaces it"
# Of temporary files, see `como_jax.files`.
_TEMPORARY = ".partial-"


class Staging:
    """The staging folder of one output directory."""

    def __init__(self, out: epath.Path, activity: str):
        """Names the folders; makes nothing.

        Args:
          out: directory to be made.
          activity: what messages call the work, such as "conversion".
        """
        self.out, self._activity = out, activity
        self.folder = staging_folder(out)
        self.dataset = self.folder / "dataset"
        self.parts = self.folder / "parts"
        self._replaced = self.folder / "replaced"
        self._done = self.folder / "done"
        self._plan = self.folder / "plan.json"
        self._lock_file = self.folder / "lock"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the output against other processes, and removes the folder in the end if no plan is left in it.

        A bucket has no locks, so other processes are not kept away there.

        Raises:
          OutputError: another process is making the same output, or the folder is not one of this project.
        """
        self._check_folder()
        self.folder.mkdir(exist_ok=True)
        with contextlib.nullcontext() if not is_local(self.folder) else self._lock():
            if self._replaced.exists() and not self.out.exists():
                self._replaced.rename(self.out)
            try:
                yield
            finally:
                if not self._plan.exists():
                    self._remove()

    def _check_folder(self) -> None:
        """Raises OutputError if the folder holds anything that no command of this project has put there."""
        if os.path.islink(self.folder):
            raise OutputError(f"{self.folder}, where this {self._activity} works, is a link; choose another `out`")
        found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        own = {path.name for path in self._own()}
        unknown = sorted(name for name in found - own if _TEMPORARY not in name)
        if unknown or (found and not found & {self._plan.name, self._lock_file.name}):
            raise OutputError(
                f"{self.folder}, where this {self._activity} works, holds what this project did not make "
                f"({listing(unknown or sorted(found))}); move it away, or choose another `out`"
            )

    def _own(self) -> list[epath.Path]:
        return [self._plan, self.dataset, self.parts, self._replaced, self._done, self._lock_file]

    def _remove(self) -> None:
        """Removes the folder, unless something was put there that is not its own."""
        _delete(*self._own(), *(path for path in self.folder.iterdir() if _TEMPORARY in path.name))
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        # The system frees this lock when the process ends; a file that merely exists would stay.
        with open(self._lock_file, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise OutputError(f"another {self._activity} into {self.out} is running ({owner})") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            yield

    def is_published(self, plan: Mapping[str, Any]) -> bool:
        """Whether an earlier run of the plan has published the dataset, and was killed before it had tidied up."""
        # The plan is written after the dataset folder is made, which only publishing moves away.
        return self._found_plan() == _as_json(plan) and not self.dataset.exists()

    def open(self, plan: Mapping[str, Any], restart: bool) -> None:
        """Makes the folder for a plan, or keeps what an earlier run of the same plan has left in it.

        Args:
          plan: everything that decides what is made, as JSON can hold it.
          restart: discard what is there.

        Raises:
          OutputError: the folder belongs to another plan, and `restart` is not set.
        """
        found = self._found_plan()
        if found is not None and self.dataset.exists() and not restart:
            if changes := _changes(found, _as_json(plan)):
                raise OutputError(
                    f"{self.folder} holds an unfinished {self._activity} with other settings or sources ({changes}); "
                    "`restart` discards it"
                )
            self.parts.mkdir(exist_ok=True)
            return
        _delete(self._plan, self.dataset, self.parts, self._replaced, self._done)
        self.dataset.mkdir()
        self.parts.mkdir()
        self._done.mkdir()
        write_json(self._plan, plan)

    def _found_plan(self) -> dict[str, Any] | None:
        return json.loads(self._plan.read_text()) if self._plan.exists() else None

    def finished(self, parts: Sequence[str]) -> dict[str, Any]:
        """Returns the notes of the parts that are complete, and removes everything else that was written."""
        finished, kept = {}, set()
        for part in parts:
            entry = self._entry(part)
            if entry is not None and all(self._has_size(name, size) for name, size in entry["files"].items()):
                finished[part] = entry["notes"]
                kept.update(entry["files"])
        for path in [*self.dataset.iterdir(), *self.parts.iterdir()]:
            if self._name(path) not in kept:
                path.unlink()
        for path in self._done.iterdir():
            if path.name.removesuffix(".json") not in finished:
                path.unlink()
        return finished

    def read_notes(self, part: str) -> Any:
        """Returns the notes of a part, or None if it is not finished."""
        entry = self._entry(part)
        return None if entry is None else entry["notes"]

    def write_notes(self, part: str, files: Sequence[epath.Path], notes: Any) -> None:
        """Marks a part as finished, after all its files are in `dataset` or `parts`.

        Notes are any JSON value but None.
        """
        sizes = {self._name(path): path.stat().length for path in files}
        write_json(self._done / f"{part}.json", {"files": sizes, "notes": notes})

    def _entry(self, part: str) -> dict[str, Any] | None:
        path = self._done / f"{part}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _has_size(self, name: str, size: int) -> bool:
        path = self.folder / name
        return path.exists() and path.stat().length == size

    def _name(self, path: epath.Path) -> str:
        return f"{path.parent.name}/{path.name}"

    def publish(self, overwrite: bool) -> None:
        """Makes the dataset the output; if this is killed at any point, the same command can go on.

        Raises:
          OutputError: the output exists, and may not be replaced.
        """
        mark_all(self.dataset)
        # Again, since much may have happened to it while the new one was made.
        check_output(self.out, overwrite)
        if self.out.exists():
            self.out.rename(self._replaced)
        self.dataset.rename(self.out)
        self.tidy()

    def tidy(self) -> None:
        """Removes what is left beside a published dataset; the plan goes last, so that a killed run can be resumed."""
        _delete(self._replaced, self.parts, self._done, self._plan)

    def discard(self) -> None:
        """Gives up the unfinished work: without a plan, the folder is removed when the lock is released."""
        _delete(self._plan)


def _delete(*paths: epath.Path) -> None:
    for path in paths:
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def _as_json(plan: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(plan))


def make_parent(out: epath.Path) -> None:
    """Makes the folder above an output; raises OutputError if that is not possible."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror or error}") from error


def staging_folder(out: epath.Path) -> epath.Path:
    """The folder beside an output, in which it is made."""
    return out.with_name(f"{out.name}.partial")


def real_output(out: epath.PathLike) -> epath.Path:
    """The path of an output, or that to which it leads if it is a link, so that a link is never replaced by a folder.

    Other paths stay as they are, so that messages show what the user knows.
    """
    path = epath.Path(out).expanduser()
    if not is_local(path):
        return path
    # Only with a name, a folder can be made beside it. The `resolve` of epath does not follow links.
    return epath.Path(os.path.realpath(path)) if path.name in ("", "..") or os.path.islink(path) else path


def check_apart(out: epath.PathLike, source: object, name: str = "`source`") -> None:
    """Raises OutputError if an output lies in what is read, or what is read lies in the output; links are followed.

    An output inside the source would be taken for data by a later run, and a source inside the output would be deleted
    with it.

    Args:
      out: of the command.
      source: folder or file that the command reads; anything but the path of a local one is apart.
      name: what messages call the source.
    """
    if not isinstance(source, str | os.PathLike) or not is_local(source) or not is_local(out):
        return
    target, root = epath.Path(out).expanduser(), os.path.expanduser(source)
    where = f"{name} {source}"
    # The source may be reached by links, and so may the output: what the paths say is looked at, and where they lead.
    _check_place(out, os.path.abspath(target), os.path.abspath(root), where)
    places = [os.path.realpath(path) for path in (target, staging_folder(real_output(target)))]
    for link, real in (("", os.path.realpath(root)), *_links(root)):
        for place in places:
            _check_place(out, place, real, f"{where}, by the link {link}," if link else where)


def _check_place(out: epath.PathLike, place: str, source: str, where: str) -> None:
    if epath.Path(place).is_relative_to(source):
        raise OutputError(f"`out` {out} lies inside {where}; choose a folder outside of it")
    if epath.Path(source).is_relative_to(place):
        raise OutputError(f"`out` {out} holds what is read: {where} lies inside it; choose a folder elsewhere")


def _links(folder: epath.PathLike) -> Iterator[tuple[str, str]]:
    """All links below a folder, those below linked folders too, and the real path to which each leads.

    But for links to a folder that holds this one, which nobody follows: they lead in circles.
    """
    root = epath.Path(os.path.realpath(folder))
    waiting, seen = [os.fspath(root)], set()
    while waiting:
        here = waiting.pop()
        if here in seen or not os.path.isdir(here):
            continue
        seen.add(here)
        try:
            entries = list(os.scandir(here))
        except OSError:
            continue  # It cannot be read, so nothing in it is.
        for entry in entries:
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                if not root.is_relative_to(real):
                    waiting.append(real)
                    yield entry.path, real
            elif entry.is_dir():
                waiting.append(entry.path)


def check_output(out: epath.Path, overwrite: bool | None) -> None:
    """Raises OutputError if something exists at an output path that may not be replaced; removes an empty folder.

    Args:
      out: the path.
      overwrite: whether a folder that this project made may be replaced; None if nothing ever may.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} exists already and is not a directory")
    if not any(out.iterdir()):
        out.rmdir()
    elif overwrite is None:
        raise OutputError(f"{out} exists already; remove it or choose another directory")
    elif not overwrite:
        raise OutputError(_EXISTS.format(out))
    elif not is_made_here(out):
        raise OutputError(
            f"{out} was not made by this project (it has no {MARK}), so `overwrite` will not replace it; choose "
            "another directory, or remove it yourself"
        )
    elif names := strangers(out):
        raise OutputError(
            f"{out} holds what this project did not make, or what was changed since: {listing(names)}; `overwrite` "
            "would delete it, so move it away first"
        )


@contextlib.contextmanager
def new_folder(out: epath.PathLike, overwrite: bool | None = None) -> Iterator[epath.Path]:
    """Makes a folder that appears complete or not at all.

    Args:
      out: the folder to be made, on this machine.
      overwrite: see `check_output`; the older folder stays until the new one is complete.

    Yields:
      A temporary folder beside `out`, which is renamed to `out` at the end, or removed after an error.

    Raises:
      OutputError: `out` is in a bucket, exists already, or cannot be made.
    """
    if not is_local(out):
        raise OutputError(f"{out} must be a folder of this machine; copy it to the bucket afterwards")
    target = real_output(out).resolve()
    check_output(target, overwrite)
    partial, replaced = (target.with_name(f".{target.name}.{part}-{uuid.uuid4().hex[:8]}") for part in ("new", "old"))
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror or error}") from error
    try:
        yield partial
        mark_all(partial)
        check_output(target, overwrite)
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    finally:
        _delete(partial, replaced)


def is_local(path: epath.PathLike) -> bool:
    """Whether a path belongs to the file system and not to a bucket."""
    return "://" not in os.fspath(path)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Names the differences between two plans; those of nested mappings one by one."""
    names = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            names += [_change(field, before, after) for field in after if before.get(field) != after[field]]
        elif before != after:
            names.append(_change(key, old, new))
    return ", ".join(names)


def _change(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    values = f"{key}: {old.get(key)}, now {new.get(key)}"
    return values if len(values) <= _MAX_SHOWN else key
