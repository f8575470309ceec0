"""Checkpoints of state and data iterator together, and the guard that keeps two runs out of one directory."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from como_jax.errors import RunError
from como_jax.files import write_text
from como_jax.training.sharding import path_name
from como_jax.training.train_state import Params, TrainState, merge_params

# Fields that may differ between a run and its resumption: they change nothing that is computed, nor the iterator's
# state, as data.num_workers does. The size of a label follows from the data fields.
FREE_FIELDS = (
    "data.num_threads",
    "evaluation.",
    "mesh.",
    "model.label_size",
    "train.checkpoint_every",
    "train.collapse_steps",
    "train.evaluate_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.stop_after",
)


class Checkpointer:
    """Saves and restores a run; a save never blocks the loop for longer than the copy to host memory."""

    def __init__(self, workdir: epath.PathLike, keep: int = 2):
        self._manager = _open(epath.Path(workdir), keep)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> None:
        """Starts saving; call before the next batch is drawn, or a resumed run skips one."""
        if self._manager.latest_step() == step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(state)), data=grain.checkpoint.CheckpointSave(iterator)
            ),
        )

    def restore(self, abstract: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """The newest state, with the shapes and shardings of `abstract`; sets the iterator's position.

        Raises:
          RunError: the checkpoint's parameters are not those of the model.
        """
        step = self._manager.latest_step()
        _check_shapes(_as_dict(abstract), _shapes(self._manager, step), str(self._manager.directory))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_as_dict(abstract)),
                data=grain.checkpoint.CheckpointRestore(iterator),
            ),
        )
        return TrainState(**restored.state)

    def close(self) -> None:
        """Waits for the save in flight."""
        self._manager.wait_until_finished()
        self._manager.close()


def load_params(workdir: epath.PathLike, abstract: Params) -> Params:
    """Reads some of a run's parameters from its newest checkpoint.

    Args:
      workdir: of the run.
      abstract: nested shapes of the wanted parameters, by module name; the moving average is preferred.

    Raises:
      RunError: no checkpoint there, or a parameter is missing or has another shape.
    """
    with _open_saved(workdir) as manager:
        step = manager.latest_step()
        saved = _shapes(manager, step)
        trained, available = _saved_params(saved)
        _check_shapes(abstract, available, str(workdir))
        target = {name: _intersect(abstract, saved.get(name) or {}) for name in (trained, "frozen")}
        target = {name: tree for name, tree in target.items() if tree}
        # Without arguments Orbax would ask for the devices of the run that saved.
        arguments = jax.tree.map(_restore_args, target)
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(target, arguments, partial_restore=True))
        )
        return merge_params(restored.state.get(trained, {}), restored.state.get("frozen", {}))


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
    with _open_saved(workdir) as manager:
        saved = _saved_params(_shapes(manager, manager.latest_step()))[1]
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


def claim_workdir(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Creates the run directory with its config, or checks that it holds a run of an equal one.

    Raises:
      RunError: the directory cannot be written, or belongs to another config.
    """
    workdir, text = epath.Path(workdir), config.to_json_best_effort(indent=2, sort_keys=True)
    path = workdir / "config.json"
    if path.exists():
        changes = _differences(json.loads(path.read_text()), json.loads(text))
        if changes:
            raise RunError(
                f"{workdir} holds a run of another config; choose a new --workdir, or resume with equal fields. "
                f"Different: {'; '.join(changes)}."
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            write_text(path, text)
    except OSError as error:
        raise RunError(f"--workdir {workdir} cannot be written: {error}") from error


def _open_saved(workdir: epath.PathLike) -> ocp.CheckpointManager:
    """Opens a run's checkpoints to read; raises RunError where there is none."""
    if not (epath.Path(workdir) / "checkpoints").exists():
        raise RunError(f"{workdir} holds no run: it has no checkpoints directory.")
    manager = _open(epath.Path(workdir), keep=None)
    if manager.latest_step() is None:
        manager.close()
        raise RunError(f"{workdir} holds no complete checkpoint yet.")
    return manager


def _saved_params(saved: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Which of the trained parameters to read, the moving average where there is one, and the shapes of all."""
    trained = "ema" if saved.get("ema") else "params"
    return trained, merge_params(saved[trained], saved.get("frozen") or {})


def _open(workdir: epath.Path, keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=keep is not None, cleanup_tmp_directories=keep is not None
    )
    return ocp.CheckpointManager(workdir.resolve() / "checkpoints", options=options)


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _shapes(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    reader = ocp.PyTreeCheckpointHandler()
    metadata = reader.metadata(manager.directory / str(step) / "state")
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


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    changes = []
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            changes += _differences(before, now, f"{name}.")
        elif before != now and not name.startswith(FREE_FIELDS):
            changes.append(f"config.{name} was {before!r} and is {now!r}")
    return changes
