"""Parameters that a fresh run takes from other runs and from files of public weights."""

from __future__ import annotations

import logging

from ml_collections import ConfigDict

from como_jax.errors import ConfigError
from como_jax.motion.perceptual import load_perceptual
from como_jax.nn.model_def import Params, merge_params
from como_jax.spec.towers import PUBLIC_TOWERS
from como_jax.training.checkpoint import load_matching_params, load_params
from como_jax.training.train_state import TrainState, replace_params
from como_jax.weights.paligemma import load_paligemma
from como_jax.weights.text import load_text_tower

logger = logging.getLogger(__name__)


def load_pretrained(config: ConfigDict, state: TrainState) -> TrainState:
    """Puts the encoder of another run and the weights of a perceptual network in place of random ones.

    Raises:
      RunError: what the config names does not fit or is not there.
      ConfigError: a perceptual network is asked for and no file of its weights.
    """
    params = merge_params(state.params, state.frozen)
    if "init_from" in config.get("encoder", {}):
        state = replace_params(state, _load_encoder(config, params["encoder"]))
    if "perceptual" in params:
        check_perceptual_file(config)
        weights = load_perceptual(config.model.perceptual_file, config.model.perceptual_space)
        state = replace_params(state, {"perceptual": weights})
    return state


def load_policy_parts(config: ConfigDict, state: TrainState) -> TrainState:
    """Puts the image encoder of a pretraining run, public text weights, or what fits of another policy into a policy.

    Raises:
      RunError: what the config names does not fit or is not there.
      ConfigError: an encoder is named for another tower.
    """
    params = merge_params(state.params, state.frozen)
    if config.encoder.init_from and config.encoder.tower != "vit":
        raise ConfigError(f"encoder.init_from needs encoder.tower=vit, not {config.encoder.tower}.")
    if config.encoder.tower == "vit":
        found = _load_encoder(config, params["observation"]["images"])
        if found:
            state = replace_params(state, {"observation": {"images": found["encoder"]}})
    if config.text.tower in PUBLIC_TOWERS:
        logger.info("Text tower from %s", config.text.weights)
        state = replace_params(state, {"observation": {"text": load_text_tower(config.text.weights)}})
    if config.model.get("weights"):
        logger.info("PaliGemma from %s", config.model.weights)
        state = replace_params(state, load_paligemma(config.model.weights, params, release=True))
    if config.init_from:
        matched = load_matching_params(config.init_from, params)
        logger.info("From %s: %s", config.init_from, matched.describe())
        state = replace_params(state, matched.params)
    return state


def _load_encoder(config: ConfigDict, params: Params) -> Params:
    """The encoder of the run that the config names; {} where it names none."""
    if config.encoder.get("init_from"):
        logger.info("Encoder from %s", config.encoder.init_from)
        return load_params(config.encoder.init_from, {"encoder": params})
    if config.encoder.get("frozen") and not config.get("init_from"):
        logger.warning("The frozen encoder is random; config.encoder.init_from starts it from an MAE run.")
    return {}


def check_perceptual_file(config: ConfigDict) -> None:
    """Raises ConfigError where the perceptual loss needs a file of weights and none is named."""
    model = config.model
    if model.get("perceptual_weight") and model.perceptual_space != "encoder" and not model.perceptual_file:
        raise ConfigError(
            f"The perceptual loss of {model.perceptual_space} needs its weights: name a .safetensors or .npz file in "
            "config.model.perceptual_file, or take the motion encoder as the perceptual space "
            "(config.model.perceptual_space=encoder), or turn the term off (config.model.perceptual_weight=0.0)."
        )
