"""Short training runs of the tiny CoMo on meshes of virtual devices."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from como_jax import types
from como_jax.nn.model_def import ModelDef
from como_jax.spec.motion import BottleneckConfig
from como_jax.training import sharding
from como_jax.training.train_state import TrainState, abstract_state, create_state
from como_jax.training.train_step import make_train_step

# Adam's usual epsilon would blow up the rounding of gradients that are 0 in exact arithmetic.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, eps=1e-3))


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of three steps, and how often the step was compiled for it."""

    mesh: Mesh
    abstract: TrainState
    state: TrainState
    losses: list[float]
    compilations: int


@pytest.fixture(scope="session")
def mesh_of() -> Callable[..., Mesh]:
    """Makes a mesh of the first virtual devices."""

    def make(*sizes: int) -> Mesh:
        devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
        return Mesh(devices, sharding.MESH_AXES)

    return make


@pytest.fixture(scope="session")
def train(make_como: Callable[..., ModelDef], mesh_of: Callable[..., Mesh]) -> Callable[..., Run]:
    """Trains three steps on a mesh of the given sizes, CoMo or another model; every run is done once."""

    codebook = BottleneckConfig("vq_ema", 8, replace_below=0.1)
    models: dict[str, Callable[[], ModelDef]] = {
        "como": lambda: make_como(freeze_encoder=False, tcl_weight=0.1),
        "discrete": lambda: make_como(motion_input="future", bottleneck=codebook, tcl_weight=0.0),
    }

    @functools.cache
    def run(sizes: tuple[int, ...], accumulation: int, name: str) -> Run:
        mesh, model = mesh_of(*sizes), models[name]()
        abstract = abstract_state(model, OPTIMIZER, mesh, use_ema=True)
        state = create_state(model, OPTIMIZER, abstract, seed=0)
        step = make_train_step(model, OPTIMIZER, mesh, abstract, seed=0, accumulation=accumulation, ema_decay=0.9)
        batch, losses = sharding.shard_batch(types.fake_frame_pairs(batch=16), mesh), []
        for _ in range(3):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        return Run(mesh, abstract, state, losses, step._cache_size())

    return lambda *sizes, accumulation=1, model="como": run(sizes, accumulation, model)
