"""Checkpoints, each of a state and the position in its data."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from como_jax import hosts
from como_jax.errors import RunError
from como_jax.nn.model_def import Params, merge_params
from como_jax.training.sharding import path_name
from como_jax.training.train_state import TrainState

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Checkpointer:
    """Saves and restores a run; a save blocks the loop only for the copy to host memory.

    Every host writes and reads its part of the arrays. The directory of a step gets its name when all of it is written,
    so that half a checkpoint is never taken for a whole one.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 2):
        self._workdir = epath.Path(workdir)
        self._manager = _open(self._workdir, keep)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> None:
        """Starts saving; call before the next batch is drawn, or a resumed run skips one.

        Raises:
          RunError: there is a checkpoint of a later step, which another process must have written.
        """
        if self._manager.latest_step() == step:
            return
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(state)), data=grain.checkpoint.CheckpointSave(iterator)
            ),
        )
        if not saved:
            raise RunError(
                f"{self._manager.directory} has a checkpoint of step {self._manager.latest_step()}, so that step "
                f"{step} cannot be saved; does another process train there?"
            )

    def restore(self, abstract: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """The newest state, with the shapes and shardings of `abstract`; sets the iterator's position.

        A checkpoint that cannot be read is put aside, and the one before it taken.

        Raises:
          RunError: the checkpoint's parameters are not those of the model, or none can be read.
        """
        wanted = _as_dict(abstract)

        def read(directory: epath.Path) -> tuple[dict[str, Any], Any]:
            _check_shapes(wanted, _shapes(directory), str(self._manager.directory))
            return _read_arrays(directory, wanted), _read_position(directory)

        steps = self._manager.all_steps()
        step, (restored, position) = _read_newest(self._manager.directory, steps, read)
        self._put_aside([other for other in steps if other > step])
        iterator.set_state(position)
        return TrainState(**restored)

    def wait(self) -> None:
        """Waits for the save in flight."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in flight, and releases the directory."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put_aside(self, steps: Sequence[int]) -> None:
        """Moves damaged checkpoints out of the way of those that will be saved."""
        if not steps:
            return
        with hosts.in_step():
            if hosts.is_first():
                aside = self._workdir / "damaged_checkpoints"
                aside.mkdir(exist_ok=True)
                for step in steps:
                    (self._manager.directory / str(step)).rename(_unused(aside, str(step)))
                logger.warning("Damaged checkpoints are kept in %s.", aside)
        self._manager.reload()


def load_params(workdir: epath.PathLike, abstract: Params) -> Params:
    """Reads some of a run's parameters from its newest checkpoint; see `load_newest`."""
    return load_newest(workdir, abstract)[1]


def load_newest(workdir: epath.PathLike, abstract: Params) -> tuple[int, Params]:
    """Reads some of a run's parameters from its newest checkpoint that can be read, and its step.

    Args:
      workdir: the directory of the run.
      abstract: nested shapes of the wanted parameters, by module name; the moving average is preferred.

    Raises:
      RunError: no checkpoint there, or a parameter is missing or has another shape.
    """

    def read(directory: epath.Path) -> Params:
        saved = _shapes(directory)
        trained, available = _saved_params(saved)
        _check_shapes(abstract, available, str(workdir))
        target = {name: _intersect(abstract, saved.get(name) or {}) for name in (trained, "frozen")}
        restored = _read_arrays(directory, {name: tree for name, tree in target.items() if tree})
        return merge_params(restored.get(trained, {}), restored.get("frozen", {}))

    return _read_newest(*_saved_steps(workdir), read)


class Matched(NamedTuple):
    """Parameters of another run; paths of what the model has beside them, and of what it has no place for."""

    params: Params
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def describe(self) -> str:
        """In one line."""
        loaded = len(traverse_util.flatten_dict(self.params))
        parts = [f"{loaded} arrays loaded"]
        for title, paths in (("new", self.new), ("dropped", self.dropped)):
            # The modules say enough; a tower has dozens of arrays.
            modules = dict.fromkeys("/".join(path.split("/")[:2]) for path in paths)
            parts.append(f"{len(paths)} {title}" + (f" ({', '.join(modules)})" if modules else ""))
        return ", ".join(parts)


def load_matching_params(workdir: epath.PathLike, abstract: Params) -> Matched:
    """Reads those of a run's parameters that have the path and shape of one of `abstract`.

    Raises:
      RunError: no checkpoint there, or nothing in it fits.
    """
    saved = _read_newest(*_saved_steps(workdir), lambda directory: _saved_params(_shapes(directory))[1])[1]
    wanted, there = (
        {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (abstract, saved)
    )
    fitting = {name for name, value in wanted.items() if name in there and tuple(there[name].shape) == value.shape}
    if not fitting:
        raise RunError(f"The checkpoint in {workdir} has no parameter of this model.")
    names = [tuple(name for name in tree if name not in fitting) for tree in (wanted, there)]
    flat = traverse_util.flatten_dict(abstract)
    chosen = {path: value for path, value in flat.items() if "/".join(map(str, path)) in fitting}
    return Matched(load_params(workdir, traverse_util.unflatten_dict(chosen)), *names)


def _saved_steps(workdir: epath.PathLike) -> tuple[epath.Path, list[int]]:
    """A run's directory of checkpoints, and their steps; raises RunError where there is none."""
    directory = epath.Path(workdir).resolve() / "checkpoints"
    if not directory.exists():
        raise RunError(f"{workdir} holds no run: it has no checkpoints directory.")
    steps = ocp.utils.checkpoint_steps(directory)
    if not steps:
        raise RunError(f"{workdir} holds no complete checkpoint yet.")
    return directory, steps


def _read_newest(directory: epath.Path, steps: Sequence[int], read: Callable[[epath.Path], T]) -> tuple[int, T]:
    """The newest step of which all hosts can read their part, and what `read` makes of its directory.

    Raises:
      RunError: no step can be read, or `read` raised it, since the checkpoint is whole but not the wanted one.
    """
    damage: list[str] = []
    for step in sorted(steps, reverse=True):
        found, problem = None, ""
        try:
            found = read(directory / str(step))
        except RunError:
            raise
        # What Orbax and TensorStore raise for files that are missing, cut off or garbled.
        except (ValueError, OSError, LookupError, TypeError) as error:
            problem = (str(error).strip().splitlines() or [""])[0][:300] or type(error).__name__
        failed = hosts.which(bool(problem))
        if not failed:
            if damage:
                logger.warning("Taking the checkpoint of step %d instead.", step)
            return step, found
        damage.append(f"step {step}: {problem or f'host {failed[0]} cannot read its part'}")
        # Of other hosts, only those that met the damage say so.
        logger.log(
            logging.ERROR if problem else logging.WARNING, "In %s a checkpoint is damaged, %s", directory, damage[-1]
        )
    raise RunError(f"No checkpoint in {directory} can be read; {'; '.join(damage)}")


def _read_arrays(directory: epath.Path, target: Any) -> Any:
    """Arrays of a checkpoint with the shapes and shardings of `target`, which may be a part of them.

    Every host reads its part without waiting for others, so that damage which one of them meets blocks none.
    """
    host = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=host, active_processes={host}, barrier_sync_key_prefix=f"host{host}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    arguments = ocp.args.PyTreeRestore(target, jax.tree.map(_restore_args, target), partial_restore=True)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        return reader.restore(directory / "state", args=arguments)


def _read_position(directory: epath.Path) -> Any:
    """The data iterator's state, which is the same on all hosts, however many there were."""
    [path, *_] = sorted((directory / "data").glob("process_0-of-*.json"))
    return json.loads(path.read_text())


def _unused(directory: epath.Path, name: str) -> epath.Path:
    """A path in the directory that is not taken."""
    number, path = 1, directory / name
    while path.exists():
        number, path = number + 1, directory / f"{name}-{number + 1}"
    return path


def _saved_params(saved: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Which of the trained parameters to read, the moving average where there is one, and the shapes of all."""
    trained = "ema" if saved.get("ema") else "params"
    return trained, merge_params(saved[trained], saved.get("frozen") or {})


def _open(workdir: epath.Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(workdir.resolve() / "checkpoints", options=options)


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _shapes(directory: epath.Path) -> dict[str, Any]:
    metadata = ocp.PyTreeCheckpointHandler().metadata(directory / "state")
    return metadata.tree if hasattr(metadata, "tree") else metadata


def _check_shapes(wanted: Any, saved: Any, where: str) -> None:
    have = {path_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(saved)}
    problems = []
    for path, value in jax.tree_util.tree_leaves_with_path(wanted):
        name = path_name(path)
        if have.get(name) != tuple(value.shape):
            problems.append(f"{name} is {have.get(name, 'missing')} there and {tuple(value.shape)} here")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise RunError(f"The checkpoint in {where} does not fit the model: {'; '.join(problems[:3])}{more}.")


def _restore_args(leaf: jax.Array | jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    """Restores like `leaf`; on one device where it has no sharding."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _intersect(abstract: Any, saved: Any) -> Any:
    """The leaves of `abstract` whose paths `saved` has too, where numbers of a list's items have become text."""
    if not isinstance(abstract, dict):
        return abstract
    shared = {key: _intersect(abstract[key], saved[str(key)]) for key in abstract if str(key) in saved}
    return {key: value for key, value in shared.items() if not (isinstance(value, dict) and not value)}
