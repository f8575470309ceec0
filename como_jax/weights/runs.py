"""Writes imported parameters as the directory of a run, which whatever takes a run's directory can start from."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx, traverse_util
from ml_collections import ConfigDict

from como_jax.errors import OutputError, RunError
from como_jax.files import write_json
from como_jax.motion.build import FAMILIES, build_model, vit_config
from como_jax.nn.vit import Siglip, Vit
from como_jax.spec.towers import VitConfig
from como_jax.training.checkpoint import load_params
from como_jax.training.run import claim_workdir, read_config
from como_jax.weights.importing import Flat

REPORT_NAME = "import_report.json"
ENCODER_FIELDS = ("patch_size", "width", "depth", "num_heads", "mlp_width")


def check_parameters(config: ConfigDict, params: Flat) -> None:
    """Raises RunError unless the parameters are all those that the config's model has, each of its shape."""
    wanted = _shapes(config)
    found = {path: value.shape for path, value in params.items()}
    for path in sorted(wanted.keys() | found.keys()):
        if wanted.get(path) != found.get(path):
            raise RunError(
                f"The imported model does not fit its config: {path} is {found.get(path)} and must be "
                f"{wanted.get(path)}; are --image_size and --num_heads right?"
            )


def write_run(out: epath.PathLike, config: ConfigDict, params: Flat, report: Mapping[str, Any]) -> None:
    """Writes config.json, a checkpoint of step 0 and the report, all of them or nothing.

    Raises:
      OutputError: there is something already, or nothing can be written there.
    """
    out = epath.Path(out).resolve()
    check_free(out)
    partial = out.with_name(f".{out.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        claim_workdir(partial, config)
        _save(partial / "checkpoints", params)
        write_json(partial / REPORT_NAME, report)
        partial.rename(out)
    except OSError as error:
        raise OutputError(f"--out {out} cannot be written: {error}") from error
    finally:
        if partial.exists():
            partial.rmtree()


def read_encoder(workdir: epath.PathLike) -> tuple[Flat, dict[str, Any]]:
    """The encoder's parameters of a run, by their paths, and the fields of the config that it has, by full name.

    Raises:
      RunError: no run, or one without an encoder.
    """
    config = read_config(epath.Path(workdir))
    try:
        shapes = _module_shapes(Vit, vit_config(config))
    except (AttributeError, KeyError) as error:
        raise RunError(f"--encoder {workdir} is a run without an encoder: {error}") from error
    params = load_params(workdir, {"encoder": shapes})
    fields = {"data.image_size": config.data.image_size}
    fields |= {f"encoder.{name}": config.encoder[name] for name in ENCODER_FIELDS if name in config.encoder}
    return {path: np.asarray(value) for path, value in traverse_util.flatten_dict(params, sep="/").items()}, fields


def check_free(out: epath.PathLike) -> None:
    """Raises OutputError if something is there already."""
    if epath.Path(out).exists():
        raise OutputError(f"--out {out} exists; choose a new directory, or remove it.")


def _save(directory: epath.Path, params: Flat) -> None:
    """What `training.checkpoint` reads parameters of; an iterator, from which a run would go on, there is none."""
    nested = traverse_util.unflatten_dict({path: jnp.asarray(value) for path, value in params.items()}, sep="/")
    state = {"step": jnp.zeros((), jnp.int32), "params": nested, "frozen": {}, "opt_state": {}, "ema": None}
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(create=True)) as manager:
        manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
        manager.wait_until_finished()


def _shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """Of all parameters of the config's model, or of the part of one that it describes."""
    if config.family in FAMILIES:
        shapes = jax.eval_shape(build_model(config).init, jax.random.key(0))
        return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}
    is_encoder = config.family == "encoder"
    tower, prefix = (Vit if is_encoder else Siglip), ("encoder" if is_encoder else "observation/images")
    flat = traverse_util.flatten_dict(_module_shapes(tower, vit_config(config)), sep="/")
    return {f"{prefix}/{path}": leaf.shape for path, leaf in flat.items()}


def _module_shapes(tower: Callable[..., nnx.Module], config: VitConfig) -> dict[str, Any]:
    """Nested shapes of a tower's parameters."""
    module = nnx.eval_shape(lambda: tower(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.split(module)[1])
