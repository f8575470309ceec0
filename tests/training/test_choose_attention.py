"""Who computes the attention of a train step."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from ml_collections import ConfigDict

from como_jax.errors import ConfigError
from como_jax.nn import attention
from como_jax.nn.attention import FusableAttention
from como_jax.nn.model_def import ModelDef
from como_jax.training import sharding
from como_jax.training.batches import DataSizes, abstract_batch, assumed_sizes
from como_jax.training.models import make_model, resolve
from como_jax.training.train_step import build_training, choose_attention, with_cudnn

GPU: Any = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))


@functools.cache
def build(name: str, **changes: Any) -> tuple[ConfigDict, ModelDef]:
    """A smoke recipe in bfloat16 by cuDNN, and its model; keys of changes have two underscores for a point."""
    config = importlib.import_module(f"configs.{name}").get_config("smoke")
    config.train.update({"dtype": "bfloat16", "attention": "cudnn"})
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    config = resolve(config, assumed_sizes(config, DataSizes()))
    return config, make_model(config)


def recipe(name: str, *, train: dict[str, str] | None = None, **changes: Any) -> tuple[ConfigDict, ModelDef]:
    """As `build`, and changes of the training of a model that is built already."""
    config, model = build(name, **changes)
    config = config.copy_and_resolve_references()
    config.train.update(train or {})
    return config, model


def implementations(model: ModelDef) -> list[str]:
    """Of all modules of attention."""
    module = model.bind(jax.eval_shape(model.init, jax.random.key(0)))
    return [part.implementation for _, part in nnx.iter_modules(module) if isinstance(part, FusableAttention)]


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        # Encoder, inverse and forward dynamics.
        ("pretrain_como", {}, 3),
        # Instruction, and both attentions of the trunk.
        ("policy_diffusion", {}, 3),
        # Images and instruction; keys of the decoder are shared.
        ("policy_vla", {"encoder__tower": "vit"}, 2),
    ],
)
def test_all_attention_of_a_trained_model_is_by_cudnn(name: str, changes: dict[str, Any], count: int) -> None:
    config, model = recipe(name, **changes)
    assert implementations(choose_attention(config, model, GPU)) == ["cudnn"] * count
    # That of evaluation, labels and export.
    assert implementations(model) == ["xla"] * count


def test_the_model_is_the_same_where_xla_is_chosen() -> None:
    config, model = recipe("pretrain_como", train={"attention": "xla"})
    assert choose_attention(config, model, sharding.make_mesh()) is model


@pytest.mark.slow
def test_a_whole_train_step_is_lowered_to_cudnn_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, attend = [], attention.attend

    def watch(*args: Any, implementation: str) -> jax.Array:
        asked.append(implementation)
        return attend(*args, implementation=implementation)

    monkeypatch.setattr(attention, "attend", watch)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    config, model = recipe("pretrain_como", train={"attention": "xla"})
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    training = build_training(config, with_cudnn(model), mesh)
    traced = training.step.trace(training.abstract, abstract_batch(config, mesh))
    # In all layers, the last of a stack too.
    assert set(asked) == {"cudnn"}
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmax(" in text and "@__cudnn$fmhaSoftmaxBackward(" in text


@pytest.mark.parametrize(
    ("changes", "mesh", "message"),
    [
        ({"attention": "flash"}, GPU, "config.train.attention 'flash' must be one of xla, cudnn"),
        ({}, sharding.make_mesh, "config.train.attention 'cudnn' needs a GPU, and training is on cpu; choose 'xla'"),
        ({"dtype": "float32"}, GPU, "config.train.attention 'cudnn' needs config.train.dtype 'bfloat16'"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, str], mesh: Any, message: str) -> None:
    config, model = recipe("pretrain_como", train=changes)
    with pytest.raises(ConfigError, match=message):
        choose_attention(config, model, mesh() if callable(mesh) else mesh)


def test_a_model_without_fitting_heads_is_refused() -> None:
    config, model = recipe("pretrain_laq")
    with pytest.raises(ConfigError, match="fits no attention of this model.* this has none without"):
        choose_attention(config, model, GPU)
