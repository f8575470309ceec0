"""Settings of the latent motion models: CoMo with its bottlenecks, LAQ, and MAE, which pretrains their encoder."""

from __future__ import annotations

import dataclasses

from como_jax.errors import ConfigError

BOTTLENECKS = ("none", "vq", "vq_ema", "nsvq", "fsq", "kl")
MOTION_INPUTS = ("difference", "future", "future_only", "rgb_difference")
FEATURE_TARGETS = ("future", "difference")
PERCEPTUAL_SPACES = ("encoder", "vgg16", "alexnet")

LAQ_POOLING = 4
"""Patches along each side that LAQ pools to one latent action, by two convolutions of stride two."""


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """Which bottleneck, and its settings.

    Attributes:
      kind: none; vq, codes trained by a loss (VQ-VAE, arXiv 1711.00937); vq_ema, codes that follow moving averages
        (same paper, appendix A.1); nsvq, noise in place of the error of quantisation (arXiv 2202.07388, as in LAPA);
        fsq, a fixed grid (arXiv 2309.15505); kl, a Gaussian whose distance to N(0, I) is penalised (beta-VAE).
      codebook_size: codes of vq, vq_ema and nsvq.
      commitment: weight of the commitment loss of vq and vq_ema.
      ema_decay: of the averages of vq_ema.
      replace_below: codes used less than this share of the mean usage are replaced by latents of the batch (0.1 in
        LAPA, on the schedule of `replacement_due`); 0 replaces none.
      fsq_levels: values of every latent number.
      kl_weight: of the divergence, a sum over the numbers of a vector; small, since pixel errors are means.
    """

    kind: str = "none"
    codebook_size: int = 128
    commitment: float = 0.25
    ema_decay: float = 0.99
    replace_below: float = 0.0
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)
    kl_weight: float = 1e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "fsq_levels", tuple(self.fsq_levels))
        checks = {
            "kind": (self.kind in BOTTLENECKS, f"must be one of {', '.join(BOTTLENECKS)}"),
            "codebook_size": (self.codebook_size >= 2, "must be at least 2"),
            "commitment": (self.commitment >= 0, "must not be negative"),
            "ema_decay": (0 <= self.ema_decay < 1, "must lie in [0, 1)"),
            "replace_below": (0 <= self.replace_below < 1, "must lie in [0, 1)"),
            "fsq_levels": (all(level >= 2 for level in self.fsq_levels), "must all be at least 2"),
            "kl_weight": (self.kl_weight >= 0, "must not be negative"),
        }
        for field, (holds, rule) in checks.items():
            if not holds:
                raise ConfigError(f"model.bottleneck.{field} {getattr(self, field)!r} {rule}.")


@dataclasses.dataclass(frozen=True)
class MotionConfig:
    """Everything of CoMo but its encoder. A loss term of weight 0 is not computed.

    Attributes:
      num_queries: latent tokens of a transition (8 in the paper).
      latent_dim: numbers in each of them (16 in the paper).
      motion_input: what the inverse dynamics model sees of the motion: "difference", the early temporal difference
        `F_{t+n} - F_t` (Td); "future", `F_{t+n}` itself; "rgb_difference", the encoder's features of
        `O_{t+n} - O_t`; all three beside `F_t`. "future_only" is `F_{t+n}` with nothing beside it.
      pair_spans: least and largest number of instants from the first frame of a pair to the second; all such pairs of
        a clip are trained on, and share the encodings of their frames.
      bottleneck: the bottleneck that the latent passes through.
      idm_width, idm_depth, idm_heads: the motion Q-former.
      fdm_width, fdm_depth, fdm_heads: the forward dynamics model.
      fdm_patch_size: its pixel patches.
      residual: whether the change of the current frame is predicted, which starts at zero; off in the paper.
      freeze_encoder: whether the encoder gets no gradient.
      mse_weight: weight of the pixel error.
      pixel_probe: whether the pixel error trains only the forward model's head, so that a model with other targets can
        still show what its latent knows.
      perceptual_weight: of the perceptual distance (LPIPS, arXiv 1801.03924).
      perceptual_space: "vgg16" or "alexnet" with weights from a file, or "encoder", the motion encoder itself.
      tcl_weight, tcl_temperature: of temporal contrastive learning, and what divides its similarities.
      tcl_gradient_everywhere: whether Tcl also trains through its two extra branches, `z(t, t+n+d)` and
        `z(t+n, t)`; the public code does not.
      feature_weight: of the error of the predicted features of the next frame, a target beside pixels or, with
        `pixel_probe`, instead of them.
      feature_target: "future", the frozen encoder's `F_{t+n}`, or "difference", `F_{t+n} - F_t`.
      flow_weight: of the error of optical flow predicted from latent and current frame.
      gap_weight: of the error of the playback gap predicted from the latent.
      label_weight: of the error of the few known actions or states, read from the latent by a linear head.
      label_size: numbers in a label; 0 means as many as the data has.
    """

    num_queries: int = 8
    latent_dim: int = 16
    motion_input: str = "difference"
    pair_spans: tuple[int, int] = (1, 1)
    bottleneck: BottleneckConfig = BottleneckConfig()
    idm_width: int = 768
    idm_depth: int = 4
    idm_heads: int = 12
    fdm_width: int = 768
    fdm_depth: int = 12
    fdm_heads: int = 12
    fdm_patch_size: int = 16
    residual: bool = False
    freeze_encoder: bool = True
    mse_weight: float = 1.0
    pixel_probe: bool = False
    perceptual_weight: float = 1.0
    perceptual_space: str = "vgg16"
    tcl_weight: float = 0.004
    tcl_temperature: float = 0.1
    tcl_gradient_everywhere: bool = False
    feature_weight: float = 0.0
    feature_target: str = "future"
    flow_weight: float = 0.0
    gap_weight: float = 0.0
    label_weight: float = 0.0
    label_size: int = 0

    def __post_init__(self) -> None:
        choices = {
            "motion_input": MOTION_INPUTS,
            "perceptual_space": PERCEPTUAL_SPACES,
            "feature_target": FEATURE_TARGETS,
        }
        for field, names in choices.items():
            if getattr(self, field) not in names:
                raise ConfigError(
                    f"model.{field} {getattr(self, field)!r} is unknown; choose one of {', '.join(names)}."
                )
        if self.feature_weight and not self.freeze_encoder:
            raise ConfigError(
                "model.feature_weight needs encoder.frozen=True: features that are target and trained collapse."
            )
        if self.label_weight and not self.label_size:
            raise ConfigError("model.label_weight needs labels: set data.labels and data.labelled_fraction.")
        for field in ("flow_weight", "label_weight"):
            if getattr(self, field) and self.pair_spans != (1, 1):
                raise ConfigError(f"model.{field} knows neighbouring instants alone: set data.pair_span to 1.")

    @property
    def spans(self) -> range:
        """Instants from the first frame of a pair to the second."""
        return range(self.pair_spans[0], self.pair_spans[1] + 1)

    @property
    def needs_network(self) -> bool:
        """Whether there is a perceptual network with weights of its own."""
        return self.perceptual_weight > 0 and self.perceptual_space != "encoder"


@dataclasses.dataclass(frozen=True)
class LaqConfig:
    """Sizes of LAQ, with the paper's values as defaults.

    Attributes:
      patch_size: pixels of a patch's side.
      width, num_heads, head_size: of all transformers.
      spatial_depth, temporal_depth: layers of the encoder.
      decoder_depth: layers of the decoder.
      latent_dim: numbers of a latent action.
      codebook_size: latent actions to choose from.
      replace_below: codes used less than this share of the mean usage are replaced.
    """

    patch_size: int = 32
    width: int = 1024
    num_heads: int = 16
    head_size: int = 64
    spatial_depth: int = 8
    temporal_depth: int = 8
    decoder_depth: int = 8
    latent_dim: int = 32
    codebook_size: int = 8
    replace_below: float = 0.1


@dataclasses.dataclass(frozen=True)
class MaeConfig:
    """Sizes of the decoder, and the share of patches that is masked; the defaults are the paper's."""

    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mask_ratio: float = 0.75
