"""The `data` section of a recipe: its fields with their defaults, which a recipe changes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What the data of motion models and of policies have in common.

    Attributes:
      mixture: DIR[:SPLIT][=WEIGHT],DIR... or MIXTURE.toml; the flag `--data` replaces it.
      image_size: side of the square images that the model sees, in pixels.
      fit: how images become square: "crop" to the central square, or "stretch".
      random_shift: largest random shift in pixels; one shift for all images of a clip or sample.
      min_crop_fraction: smallest side of the part that is cut out at random, as a share of the image's side.
      batch_size: clips or samples of all hosts together.
      num_threads: decoding threads of each process.
      num_workers: decoding processes; 0 decodes in threads of the training process.
      frame_cache_gib: decoded frames of datasets that fit into so many GiB together are kept in memory-mapped files; 0
        decodes them anew every time, as is always done where `min_crop_fraction` is less than 1.
    """

    mixture: str
    image_size: int = 224
    fit: str = "crop"
    random_shift: int = 10
    min_crop_fraction: float = 1.0
    batch_size: int = 256
    num_threads: int = 16
    num_workers: int = 0
    frame_cache_gib: float = 4.0


@dataclasses.dataclass(frozen=True)
class MotionDataSettings(DataSettings):
    """Clips for motion models.

    Attributes:
      camera: name of the camera; "" for the first camera of every dataset.
      gap_seconds: time from the first frame of a pair to the second.
      min_gap_fraction: gaps are drawn between this share of `gap_seconds` and all of it.
      instants: frames of a clip, each encoded once; one gap apart if `pair_span` is 1.
      pair_span: instants that a gap spans. A pair is any two instants whose gap is at least `min_gap_fraction` of
        `gap_seconds`.
      min_motion: mean change of a step, in [0, 1], under which a clip is left out as still.
      max_motion: change of one step over which a clip is left out as cut.
    """

    mixture: str = "datasets/tabletop"
    camera: str = ""
    gap_seconds: float = 0.5
    min_gap_fraction: float = 1.0
    instants: int = 2
    pair_span: int = 1
    min_motion: float = 0.0
    max_motion: float = 1.0


@dataclasses.dataclass(frozen=True)
class PolicyDataSettings(DataSettings):
    """Action chunks for policies, of robot data and of labelled videos.

    Attributes:
      videos: names of datasets without actions that take part; () trains on robot data alone.
      latent_only: leaves out all actions: the first of two stages.
      robot_latents: whether labels of robot data are used beside its actions.
      cameras: names of the cameras; () takes the first camera of every dataset.
      instants: images of each camera: now, and the history.
      stride: control steps between two of them.
      chunk: actions that are predicted at once.
      proprioception: whether the policy reads the robot's state.
      state_size: numbers in the state; 0 takes what the data has.
      normalization: of actions and states: "none", "mean_std", "quantile", "min_max" or "uniform".
      latent_normalization: of latent motion, likewise.
      missing_instructions: "refuse", or "empty" to train on episodes without an instruction.
    """

    mixture: str = "datasets/robot,datasets/labelled"
    videos: tuple[str, ...] = ("*",)
    latent_only: bool = False
    robot_latents: bool = False
    cameras: tuple[str, ...] = ()
    instants: int = 1
    stride: int = 1
    chunk: int = 16
    proprioception: bool = True
    state_size: int = 0
    normalization: str = "min_max"
    latent_normalization: str = "mean_std"
    missing_instructions: str = "refuse"
