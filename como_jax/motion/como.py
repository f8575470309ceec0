"""CoMo (arXiv 2505.17006) and its variants: latent motion between an inverse and a forward dynamics model.

For a pair of frames `O_t` and `O_{t+n}` with features `F = encoder(O)`:

    z         = IDM(F_t, F_{t+n} - F_t)     inverse dynamics; the difference of features (Td) is the default input
    latent    = bottleneck(z)               nothing in CoMo; a codebook, a grid or a Gaussian in its variants
    prediction = FDM(O_t, latent)           forward dynamics

    loss = mse_weight * |prediction - O_{t+n}|^2 + perceptual_weight * LPIPS(prediction, O_{t+n})
           + tcl_weight * Tcl(z) + further terms of `MotionConfig`, each of weight 0 by default

`dynamics.py` holds IDM and FDM, `bottlenecks.py` the bottlenecks, `losses.py` and `perceptual.py` the loss terms.

Axes: B batch, T or K instants, P pairs, H and W pixels, N tokens of one frame, D width, Q queries, L numbers of one
latent token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.motion import losses, perceptual
from como_jax.motion.bottlenecks import make_bottleneck
from como_jax.motion.dynamics import FlowHead, ForwardDynamics, InverseDynamics
from como_jax.nn.layers import Linear, denormalize_frames, normalize_frames
from como_jax.nn.primitives import merge_leading
from como_jax.nn.vit import Vit
from como_jax.spec.motion import MotionConfig
from como_jax.spec.towers import VitConfig
from como_jax.types import EncodedPair, FramePairs, LossOutput


class EncodedFrames(NamedTuple):
    """One frame of every pair, or all instants of a clip: normalised `[B, P, H, W, 3]` and encoded `[B, P, N, D]`.

    `images` may be None where only the features are needed.
    """

    images: jax.Array | None
    features: jax.Array


class Como(nnx.Module):
    """The motion model: encoder, inverse dynamics model, bottleneck and forward dynamics model."""

    def __init__(
        self,
        vit: VitConfig,
        config: MotionConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.config = config
        common = {"dtype": dtype, "remat": remat, "rngs": rngs}
        self.encoder = Vit(vit, **{**common, "remat": "none" if config.freeze_encoder else remat})
        self.bottleneck = make_bottleneck(config.bottleneck, config.latent_dim, rngs=rngs)
        self.idm = InverseDynamics(
            vit.grid**2 + 1,
            vit.width,
            self.bottleneck.input_dim,
            num_queries=config.num_queries,
            width=config.idm_width,
            depth=config.idm_depth,
            num_heads=config.idm_heads,
            conditioned=config.motion_input != "future_only",
            **common,
        )
        self.fdm = ForwardDynamics(
            vit.image_size,
            (config.num_queries, config.latent_dim),
            patch_size=config.fdm_patch_size,
            width=config.fdm_width,
            depth=config.fdm_depth,
            num_heads=config.fdm_heads,
            residual=config.residual,
            **common,
        )
        self._add_objectives(vit, dtype, rngs)

    def _add_objectives(self, vit: VitConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """Heads and networks of the loss terms whose weights are not 0."""
        config, latent_size = self.config, self.config.num_queries * self.config.latent_dim
        if config.needs_network:
            self.perceptual = perceptual.Lpips(config.perceptual_space, dtype=dtype, rngs=rngs)
        if config.feature_weight:
            if config.fdm_patch_size != vit.patch_size:
                raise ConfigError(
                    f"model.feature_weight needs equal patches: model.fdm_patch_size is {config.fdm_patch_size} and "
                    f"encoder.patch_size {vit.patch_size}."
                )
            self.feature_head = Linear(config.fdm_width, vit.width, dtype=jnp.float32, rngs=rngs)
        if config.flow_weight:
            self.flow_head = FlowHead(config.fdm_width, config.fdm_patch_size, rngs=rngs)
        if config.gap_weight:
            self.gap_head = Linear(latent_size, 1, dtype=jnp.float32, rngs=rngs)
        if config.label_weight:
            self.label_head = Linear(latent_size, config.label_size, dtype=jnp.float32, rngs=rngs)

    def frozen_paths(self) -> tuple[str, ...]:
        """Parameters that the optimiser leaves alone, as prefixes of their paths."""
        encoder = ("encoder",) if self.config.freeze_encoder else ()
        network = ("perceptual",) if self.config.needs_network else ()
        return (*encoder, *network, *(f"bottleneck/{name}" for name in self.bottleneck.frozen))

    def encode(self, frames: jax.Array) -> jax.Array:
        """Latent motion `[B, T - 1, Q, L]` between consecutive frames of uint8 `[B, T, H, W, 3]`."""
        return self.bottleneck(self._infer_consecutive(frames)).latent

    def codes(self, frames: jax.Array) -> jax.Array:
        """Codes int32 `[B, T - 1, Q]` of the same latent motion; raises ConfigError for a continuous bottleneck."""
        return self.bottleneck.codes(self._infer_consecutive(frames))

    def encode_frame(self, frames: jax.Array) -> dict[str, jax.Array]:
        """Features `[B, N, D]` of uint8 frames `[B, H, W, 3]`; also the frames, if their difference is encoded."""
        encoded = {"features": self._features(normalize_frames(frames)[:, None])[:, 0]}
        return encoded | ({"frames": frames} if self.config.motion_input == "rgb_difference" else {})

    def encode_pair(self, source: dict[str, jax.Array], target: dict[str, jax.Array]) -> EncodedPair:
        """The motion from each source to its target, both as `encode_frame` gives them."""
        frames = [
            EncodedFrames(normalize_frames(x["frames"]) if "frames" in x else None, x["features"])
            for x in (source, target)
        ]
        inferred = self._infer(*jax.tree.map(lambda x: x[:, None], frames))[:, 0]
        return self.bottleneck.latent_motion(inferred)

    def predict(self, frame: jax.Array, latent: jax.Array) -> jax.Array:
        """The frame, float32 in [0, 1] `[B, H, W, 3]`, that follows uint8 `frame` under `latent` `[B, Q, L]`."""
        return denormalize_frames(self.fdm(normalize_frames(frame), latent))

    def loss(self, batch: FramePairs, key: jax.Array) -> LossOutput:
        """The weighted sum of all terms whose weights are not 0, each averaged over all pairs of the batch."""
        config, instants = self.config, batch.frames.shape[1]
        images = normalize_frames(batch.frames)
        if batch.offset_frames is not None:
            images = jnp.concatenate([images, normalize_frames(batch.offset_frames)], axis=1)
        # Every frame is encoded once, however many pairs it belongs to.
        clip = EncodedFrames(images, self._features(images))
        current, future, offset = (
            jax.tree.map(lambda x, choose=choose: choose(x, instants, config.spans), clip)
            for choose in (_sources, _targets, _offsets)
        )
        inferred = self._infer(current, future)
        passed = self.bottleneck(inferred, key)
        terms = self._prediction_terms(current, future, passed.latent, batch) | self._latent_terms(passed.latent, batch)
        if config.tcl_weight:
            terms["tcl"] = self._contrast(self.bottleneck.center(inferred), current, future, offset)
        total = sum(self._weight(name) * value for name, value in terms.items()) + passed.loss
        statistics = {"bottleneck": passed.statistics} if passed.statistics else {}
        return LossOutput(total, {**terms, **passed.terms}, statistics)

    def update_codebook(
        self, statistics: dict[str, Any], step: jax.Array, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """New parameters of the codebook after an update, and scalars for a dashboard; see `LatentMotionModel`."""
        params, metrics = self.bottleneck.update_codebook(statistics["bottleneck"], step, key)
        return {"bottleneck": params}, metrics

    def _weight(self, term: str) -> float:
        if term == "mse" and self.config.pixel_probe:
            return 1.0
        return getattr(self.config, f"{term}_weight")

    def _features(self, images: jax.Array) -> jax.Array:
        """Token features `[B, T, N, D]` of normalised images `[B, T, H, W, 3]`."""
        chex.assert_rank(images, 5)
        features = self.encoder(merge_leading(images)).reshape(*images.shape[:2], -1, self.encoder.config.width)
        return jax.lax.stop_gradient(features) if self.config.freeze_encoder else features

    def _infer_consecutive(self, frames: jax.Array) -> jax.Array:
        """Input of the bottleneck, `[B, T - 1, Q, ...]`, for consecutive frames of uint8 `[B, T, H, W, 3]`."""
        images = normalize_frames(frames)
        features = self._features(images)
        return self._infer(
            EncodedFrames(images[:, :-1], features[:, :-1]), EncodedFrames(images[:, 1:], features[:, 1:])
        )

    def _infer(self, source: EncodedFrames, target: EncodedFrames) -> jax.Array:
        """Output of the inverse dynamics model, `[B, P, Q, ...]`, for the transitions from `source` to `target`."""
        if self.config.motion_input == "difference":
            motion = target.features - source.features
        elif self.config.motion_input == "rgb_difference":
            # The mean that normalisation subtracts cancels.
            motion = self._features(target.images - source.images)
        else:
            motion = target.features
        inferred = self.idm(merge_leading(source.features), merge_leading(motion))
        return inferred.reshape(*motion.shape[:2], *inferred.shape[1:])

    def _prediction_terms(
        self, current: EncodedFrames, future: EncodedFrames, latent: jax.Array, batch: FramePairs
    ) -> dict[str, jax.Array]:
        """Errors of what the forward dynamics model predicts of the next frame."""
        config, terms = self.config, {}
        images, target = merge_leading(current.images), merge_leading(future.images)
        tokens = self.fdm.tokens(images, merge_leading(latent))
        drawn = self.fdm.pixels(jax.lax.stop_gradient(tokens) if config.pixel_probe else tokens, images)
        terms["mse"] = losses.mean_squared_error(drawn, target)
        if config.perceptual_weight:
            terms["perceptual"] = self._perceptual_distance(drawn, target, merge_leading(future.features))
        if config.feature_weight:
            features = future.features - current.features if config.feature_target == "difference" else future.features
            # The class token belongs to no patch.
            terms["feature"] = losses.mean_squared_error(self.feature_head(tokens), merge_leading(features)[:, 1:])
        if config.flow_weight:
            terms["flow"] = losses.flow_error(self.flow_head(tokens), merge_leading(_need(batch.flow, "flow")))
        return terms

    def _latent_terms(self, latent: jax.Array, batch: FramePairs) -> dict[str, jax.Array]:
        """Errors of what linear heads read from the latent motion."""
        config, terms, flat = self.config, {}, _flatten(latent)
        if config.gap_weight:
            instants = batch.frames.shape[1]
            spans = np.concatenate([np.full(instants - span, span, np.float32) for span in config.spans])
            gap = merge_leading(_need(batch.gap, "gap")[:, None] * spans)
            terms["gap"] = losses.mean_squared_error(self.gap_head(flat)[:, 0], jnp.log2(gap))
        if config.label_weight:
            true = merge_leading(_need(batch.supervision, "label"))
            terms["label"] = losses.masked_mse(self.label_head(flat), true, merge_leading(batch.has_supervision))
        return terms

    def _perceptual_distance(self, drawn: jax.Array, target: jax.Array, features: jax.Array) -> jax.Array:
        # Gradients change the drawn image only, never the network that measures the distance.
        if self.config.needs_network:
            return jnp.mean(_without_gradient(self.perceptual)(drawn, target))
        space = _without_gradient(self.encoder)
        return jnp.mean(perceptual.feature_distance(space(drawn), jax.lax.stop_gradient(features)))

    def _contrast(
        self, latent: jax.Array, current: EncodedFrames, future: EncodedFrames, offset: EncodedFrames
    ) -> jax.Array:
        """Tcl, with the extra branches z(t, t+n+d), the positive, and z(t+n, t), the true reversal."""
        if offset.images.shape != future.images.shape:
            raise ConfigError(
                "model.tcl_weight needs offset frames in the batch: set data.offset_frames, or model.tcl_weight to 0."
            )
        model, sources, targets = self, (current, future), (offset, current)
        if not self.config.tcl_gradient_everywhere:
            model, sources, targets = _without_gradient(self), *jax.lax.stop_gradient((sources, targets))
        # Joined along pairs, because the batch is split over devices.
        extra = model._infer(
            *(jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *frames) for frames in (sources, targets))
        )
        shifted, reverse = jnp.split(model.bottleneck.center(extra), 2, axis=1)
        return losses.temporal_contrastive(
            _flatten(latent), _flatten(shifted), _flatten(reverse), self.config.tcl_temperature
        )


def _sources(x: jax.Array, instants: int, spans: range) -> jax.Array:
    """The first instant of all pairs, `[B, P, ...]`, out of `[B, K or more, ...]`."""
    return jnp.concatenate([x[:, : instants - span] for span in spans], axis=1)


def _targets(x: jax.Array, instants: int, spans: range) -> jax.Array:
    """The second instant of all pairs."""
    return jnp.concatenate([x[:, span:instants] for span in spans], axis=1)


def _offsets(x: jax.Array, instants: int, spans: range) -> jax.Array:
    """The offset frame of each second instant; those of all instants but the first follow the instants in `x`."""
    return jnp.concatenate([x[:, instants + span - 1 :] for span in spans], axis=1)


def _flatten(latent: jax.Array) -> jax.Array:
    """`[B, P, Q, L]` to `[B * P, Q * L]`."""
    return latent.reshape(latent.shape[0] * latent.shape[1], -1)


def _without_gradient(module: nnx.Module) -> Any:
    """The same module with parameters that no gradient reaches."""
    graphdef, params = nnx.split(module)
    return nnx.merge(graphdef, jax.lax.stop_gradient(params))


def _need(value: jax.Array | None, term: str) -> jax.Array:
    if value is None:
        raise ConfigError(f"model.{term}_weight is not 0, but the batch lacks the data of this term; set it to 0.")
    return value
