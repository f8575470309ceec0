"""Bottlenecks between the inverse and the forward dynamics model: none, a codebook, a grid of values, or a Gaussian.

Axes: K codes, L numbers of a latent vector; `...` any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.spec.motion import BottleneckConfig
from como_jax.types import EncodedPair

# A code is dead if its share of the latents, averaged over about the last fifty updates, is below DEAD_SHARE / K.
DEAD_SHARE = 0.01
SHARE_DECAY = 0.98
MAX_LOG_VARIANCE = 10.0


class Bottlenecked(NamedTuple):
    """The output of a bottleneck.

    Attributes:
      latent: `[..., L]`, the input of the forward dynamics model.
      loss: scalar to add to the model's loss, already weighted.
      terms: scalars for a dashboard.
      statistics: means over the batch that `Bottleneck.update_codebook` reads; empty without codes.
    """

    latent: jax.Array
    loss: jax.Array
    terms: dict[str, jax.Array]
    statistics: dict[str, jax.Array]


class Bottleneck(nnx.Module):
    """No bottleneck at all; the base class of all others.

    Attributes:
      input_dim: numbers of an input vector.
      latent_dim: numbers of an output vector.
      frozen: names of parameters that no gradient trains.
      is_discrete: whether every output vector is one of a finite number of codes.
    """

    frozen: tuple[str, ...] = ()
    is_discrete = False

    def __init__(self, latent_dim: int):
        self.input_dim = self.latent_dim = latent_dim

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> Bottlenecked:
        """Passes `[..., input_dim]`: with a key as in training, without one as in inference, where nothing is drawn."""
        del key
        return Bottlenecked(z, jnp.zeros(()), {}, {})

    def center(self, z: jax.Array) -> jax.Array:
        """The continuous latent `[..., L]`, before it is rounded or drawn."""
        return z

    def latent_motion(self, z: jax.Array) -> EncodedPair:
        """The latent motion in inference of `[..., input_dim]`."""
        return EncodedPair(self(z).latent, self.codes(z) if self.is_discrete else None)

    def codes(self, z: jax.Array) -> jax.Array:
        """The number of every vector's code, int32 `[...]`.

        Raises:
          ConfigError: this bottleneck has no codes.
        """
        raise ConfigError("model.bottleneck.kind must be vq, vq_ema, nsvq or fsq: none and kl have no codes.")

    def update_codebook(
        self, statistics: dict[str, jax.Array], step: jax.Array, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Parameters to replace after an update of the model, and scalars for a dashboard.

        Args:
          statistics: those of `__call__`, averaged over the whole batch.
          step: int32 scalar, updates done.
          key: draws the replacements of codes.
        """
        del statistics, step, key
        return {}, {}


class Gaussian(Bottleneck):
    """A Gaussian (beta-VAE): the input is its mean and log variance; training draws from it, inference takes the mean.

    Its loss is `weight * KL(N(mean, variance) || N(0, I))`.
    """

    def __init__(self, latent_dim: int, weight: float):
        super().__init__(latent_dim)
        self.input_dim, self.weight = 2 * latent_dim, weight

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> Bottlenecked:
        mean, log_variance = jnp.split(z, 2, axis=-1)
        log_variance = jnp.clip(log_variance, -MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)
        divergence = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance, axis=-1)
        kl = jnp.mean(divergence)
        noise = 0.0 if key is None else jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        return Bottlenecked(mean + noise, self.weight * kl, {"kl": kl}, {})

    def center(self, z: jax.Array) -> jax.Array:
        return jnp.split(z, 2, axis=-1)[0]


class FiniteScalar(Bottleneck):
    """FSQ (arXiv 2309.15505): every number is rounded to one of a few values in [-1, 1]; nothing is learned."""

    is_discrete = True

    def __init__(self, levels: Sequence[int]):
        super().__init__(len(levels))
        self.levels = tuple(levels)
        self.codebook_size = math.prod(levels)

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> Bottlenecked:
        del key
        bounded = self._bound(z)
        steps = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
        half = np.asarray(self.levels) // 2
        statistics = {"frequency": _frequency(self.codes(z), self.codebook_size)}
        return Bottlenecked(steps / half, jnp.zeros(()), {}, statistics)

    def codes(self, z: jax.Array) -> jax.Array:
        digits = jnp.round(self._bound(z)).astype(jnp.int32) + np.asarray(self.levels) // 2
        radix = np.concatenate([[1], np.cumprod(self.levels)[:-1]])
        return jnp.sum(digits * radix, axis=-1).astype(jnp.int32)

    def update_codebook(
        self, statistics: dict[str, jax.Array], step: jax.Array, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        return {}, _perplexity(statistics["frequency"])

    def _bound(self, z: jax.Array) -> jax.Array:
        """Numbers that round to `levels` integers around 0; of an even number of levels, one more is negative."""
        levels = np.asarray(self.levels)
        half_width = (levels - 1) * (1 - 1e-3) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        return jnp.tanh(z + np.arctanh(offset / half_width)) * half_width - offset


class Codebook(Bottleneck):
    """The nearest of K learned codes; subclasses say how gradients pass and how the codes learn.

    Parameters beside the codes: `usage`, how often each code was used since the last replacement, and `share`, the
    moving average of its share.
    """

    frozen = ("usage", "share")
    is_discrete = True

    def __init__(self, latent_dim: int, config: BottleneckConfig, *, rngs: nnx.Rngs):
        super().__init__(latent_dim)
        self.config = config
        # Latents start at a magnitude of about 1. Much smaller codes would all lie at the centre: one would win all.
        codes = jax.random.normal(rngs.params(), (config.codebook_size, latent_dim))
        self.codebook = nnx.Param(codes)
        self.usage = nnx.Param(jnp.zeros(config.codebook_size))
        self.share = nnx.Param(jnp.full(config.codebook_size, 1.0 / config.codebook_size))

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> Bottlenecked:
        chex.assert_axis_dimension(z, -1, self.latent_dim)
        codes = self.codes(z)
        nearest = self.codebook[...][codes]
        loss, terms = self._loss(z, nearest)
        latent = nearest if key is None else self._pass(z, nearest, key)
        return Bottlenecked(latent, loss, terms, self._statistics(z, codes))

    def codes(self, z: jax.Array) -> jax.Array:
        codebook = self.codebook[...]
        # |z - c|^2 = |c|^2 - 2 z.c + |z|^2, whose last term is the same for all codes.
        distance = jnp.sum(jnp.square(codebook), axis=-1) - 2.0 * jnp.einsum(
            "...l,kl->...k", z, codebook, precision=jax.lax.Precision.HIGHEST
        )
        return jnp.argmin(distance, axis=-1).astype(jnp.int32)

    def update_codebook(
        self, statistics: dict[str, jax.Array], step: jax.Array, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        frequency = statistics["frequency"]
        share = SHARE_DECAY * self.share[...] + (1.0 - SHARE_DECAY) * frequency
        dead = jnp.sum(share < DEAD_SHARE / self.config.codebook_size)
        new = {"share": share, "usage": self.usage[...] + frequency, **self._averages(statistics)}
        if self.config.replace_below:
            new |= self._replace(new, statistics["candidates"], step, key)
        return new, {**_perplexity(frequency), "dead_codes": dead}

    def _loss(self, z: jax.Array, nearest: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The weighted loss of the codes, and its terms."""
        del z, nearest
        return jnp.zeros(()), {}

    def _pass(self, z: jax.Array, nearest: jax.Array, key: jax.Array) -> jax.Array:
        """The output in training; here the straight-through estimator: the code forwards, the identity backwards."""
        del key
        return z + jax.lax.stop_gradient(nearest - z)

    def _statistics(self, z: jax.Array, codes: jax.Array) -> dict[str, jax.Array]:
        """How often each code is used, and K latents of the batch that may replace codes, evenly spaced over it."""
        statistics = {"frequency": _frequency(codes, self.config.codebook_size)}
        if self.config.replace_below:
            vectors = jax.lax.stop_gradient(z).reshape(-1, self.latent_dim)
            chosen = np.linspace(0, len(vectors) - 1, self.config.codebook_size).astype(int)
            statistics["candidates"] = vectors[chosen]
        return statistics

    def _averages(self, statistics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """New values of the parameters that are moving averages over batches and get no gradient."""
        del statistics
        return {}

    def _replace(
        self, new: dict[str, jax.Array], candidates: jax.Array, step: jax.Array, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Replaces codes that are hardly used by latents of the batch, if it is time, and starts to count anew."""
        codebook, usage = new.get("codebook", self.codebook[...]), new["usage"]
        due = replacement_due(step)
        rare = due & (usage < self.config.replace_below * jnp.mean(usage))
        equal_share = jnp.full_like(usage, 1.0 / self.config.codebook_size)
        return {
            "codebook": jnp.where(rare[:, None], jax.random.permutation(key, candidates), codebook),
            "usage": jnp.where(due, 0.0, usage),
            "share": jnp.where(rare, equal_share, new["share"]),
        }


class LossCodebook(Codebook):
    """VQ-VAE (arXiv 1711.00937): a loss draws codes to their latents and, times `commitment`, latents to codes."""

    def _loss(self, z: jax.Array, nearest: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        codebook = jnp.mean(jnp.square(jax.lax.stop_gradient(z) - nearest))
        commitment = jnp.mean(jnp.square(z - jax.lax.stop_gradient(nearest)))
        return codebook + self.config.commitment * commitment, {"commitment": commitment}


class AveragedCodebook(Codebook):
    """VQ-VAE whose codes are moving averages of their latents (arXiv 1711.00937, appendix A.1)."""

    frozen = (*Codebook.frozen, "codebook", "code_count", "code_sum")

    def __init__(self, latent_dim: int, config: BottleneckConfig, *, rngs: nnx.Rngs):
        super().__init__(latent_dim, config, rngs=rngs)
        self.code_count = nnx.Param(self.share[...])
        self.code_sum = nnx.Param(self.codebook[...] / config.codebook_size)

    def _loss(self, z: jax.Array, nearest: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        commitment = jnp.mean(jnp.square(z - jax.lax.stop_gradient(nearest)))
        return self.config.commitment * commitment, {"commitment": commitment}

    def _pass(self, z: jax.Array, nearest: jax.Array, key: jax.Array) -> jax.Array:
        return super()._pass(z, jax.lax.stop_gradient(nearest), key)

    def _statistics(self, z: jax.Array, codes: jax.Array) -> dict[str, jax.Array]:
        vectors = jax.lax.stop_gradient(z).reshape(-1, self.latent_dim)
        total = jax.ops.segment_sum(vectors, codes.reshape(-1), self.config.codebook_size)
        return {**super()._statistics(z, codes), "code_sum": total / len(vectors)}

    def _averages(self, statistics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        decay = self.config.ema_decay
        count = decay * self.code_count[...] + (1.0 - decay) * statistics["frequency"]
        total = decay * self.code_sum[...] + (1.0 - decay) * statistics["code_sum"]
        # Laplace smoothing keeps a code without latents finite.
        smoothed = (count + 1e-5) / (1.0 + 1e-5 * len(count))
        return {"code_count": count, "code_sum": total, "codebook": total / smoothed[:, None]}

    def _replace(
        self, new: dict[str, jax.Array], candidates: jax.Array, step: jax.Array, key: jax.Array
    ) -> dict[str, jax.Array]:
        replaced = super()._replace(new, candidates, step, key)
        moved = jnp.any(replaced["codebook"] != new["codebook"], axis=-1)
        count = jnp.where(moved, 1.0 / self.config.codebook_size, new["code_count"])
        total = jnp.where(moved[:, None], replaced["codebook"] * count[:, None], new["code_sum"])
        return {**replaced, "code_count": count, "code_sum": total}


class NoiseCodebook(Codebook):
    """NSVQ (arXiv 2202.07388): in training, noise of the same length replaces the error of quantisation.

    Gradients pass through the length, to the latents and to the codes.
    """

    def _pass(self, z: jax.Array, nearest: jax.Array, key: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, z.shape)
        return z + _norm(z - nearest) / _norm(noise) * noise


def make_bottleneck(config: BottleneckConfig, latent_dim: int, *, rngs: nnx.Rngs) -> Bottleneck:
    """The bottleneck of a config; raises ConfigError if it does not fit the size of the latent."""
    if config.kind == "none":
        return Bottleneck(latent_dim)
    if config.kind == "kl":
        return Gaussian(latent_dim, config.kl_weight)
    if config.kind == "fsq":
        if len(config.fsq_levels) != latent_dim:
            raise ConfigError(
                f"model.bottleneck.fsq_levels {config.fsq_levels} must have as many levels as model.latent_dim, "
                f"{latent_dim}, has numbers."
            )
        return FiniteScalar(config.fsq_levels)
    classes = {"vq": LossCodebook, "vq_ema": AveragedCodebook, "nsvq": NoiseCodebook}
    return classes[config.kind](latent_dim, config, rngs=rngs)


def replacement_due(step: jax.Array) -> jax.Array:
    """Whether codes are replaced after this update, on the schedule of LAPA (arXiv 2410.11758).

    That is every 10 updates until 100, every 100 until 1,000 and every 500 until 5,000.
    """
    due = [(step <= until) & (step % every == 0) for until, every in ((100, 10), (1000, 100), (5000, 500))]
    return due[0] | due[1] | due[2]


def _norm(x: jax.Array) -> jax.Array:
    """Length along the last axis, which is kept with size 1; the gradient at 0 is 0, where that of a norm is NaN."""
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))


def _frequency(codes: jax.Array, size: int) -> jax.Array:
    """The share of every code among all `codes`, `[K]`."""
    return jnp.bincount(codes.reshape(-1), length=size).astype(jnp.float32) / codes.size


def _perplexity(frequency: jax.Array) -> dict[str, jax.Array]:
    """The number of codes in use, as the exponential of the entropy of their frequencies, and its share of all."""
    perplexity = jnp.exp(-jnp.sum(jax.scipy.special.xlogy(frequency, frequency)))
    return {"perplexity": perplexity, "perplexity_share": perplexity / len(frequency)}
