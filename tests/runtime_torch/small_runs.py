"""Small motion models with random numbers everywhere, also where training would start from zeros and ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from como_jax.motion.models import build_model
from como_jax.spec.exported import WEIGHTS_NAME, Exported, read_description
from como_jax.training import sharding
from como_jax.training.run import Run
from como_jax.weights.importing import Flat
from como_jax.weights.tables import DeepTable, make_parameters
from como_jax.weights.tensors import Tensors


def make_run(recipe: str, changes: dict[str, Any] | None = None, workdir: Path = Path("run")) -> Run:
    """The run of a recipe's smoke variant, with changes by full name, of which nothing is on disk."""
    config = importlib.import_module(f"configs.pretrain_{recipe}").get_config("smoke")
    # Two layers, so that their order matters, and another width, so that no tensor fits where it does not belong.
    sizes = {"encoder.depth": 2, "encoder.width": 24, "model.num_queries": 3} if recipe != "laq" else {}
    with config.unlocked():
        config.update_from_flattened_dict({**sizes, "data.image_size": 64, **(changes or {})})
    model = build_model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    host = sharding.make_mesh(devices=jax.devices("cpu")[:1])
    params = jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), shapes)
    params = jax.device_put(params, sharding.replicated(host))
    return Run(epath.Path(workdir), config, model, params, 7)


def read_exported(folder: Path, kind: type[Exported], make_table: Callable[[Exported], DeepTable]) -> tuple[Any, Flat]:
    """What config.json says of an exported model, and the parameters in its file, all of which the table knows."""
    described, _ = read_description(folder, kind)
    tensors = Tensors(epath.Path(folder) / WEIGHTS_NAME)
    params = make_parameters(make_table(described), tensors)
    tensors.check_unread()
    return described, params
