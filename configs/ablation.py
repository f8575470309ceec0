"""Every motion model at one small size, for the same data, encoder and number of steps: experiments/ABLATION.md.

    bash tools/ablation.sh OUT [DATA]

trains the encoder and all rows with three seeds. One row of the table:

    python -m experiments.pretrain --config configs/ablation.py:como --workdir RUN --data DIR

The variant names the row; `encoder` is the encoder that all but LAQ start from.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import (
    pretrain_como,
    pretrain_continuous,
    pretrain_continuous_tcl,
    pretrain_continuous_td,
    pretrain_discrete,
    pretrain_future_features,
    pretrain_laq,
    pretrain_mae,
    pretrain_rgb_difference,
)

# Row: recipe, and what the row changes of it.
ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "future_features": (pretrain_future_features, {}),
    "discrete": (pretrain_discrete, {}),
    "continuous": (pretrain_continuous, {}),
    "continuous_td": (pretrain_continuous_td, {}),
    "continuous_tcl": (pretrain_continuous_tcl, {}),
    "como": (pretrain_como, {}),
    "rgb_difference": (pretrain_rgb_difference, {}),
    "laq": (pretrain_laq, {}),
    "como_features": (pretrain_como, {"model.feature_weight": 1.0, "model.pixel_probe": True}),
    "como_flow": (pretrain_como, {"model.flow_weight": 1.0}),
    "como_labels": (pretrain_como, {"model.label_weight": 0.1, "data.labelled_fraction": 0.05}),
}
VARIANTS = tuple(ROWS)
NUM_STEPS = 400
ENCODER = {"width": 96, "num_heads": 2}


def get_config(variant: str = "como") -> ConfigDict:
    """One row of the table, or its encoder."""
    if variant == "encoder":
        config = pretrain_mae.get_config("tiny")
        config.train.update({"num_steps": 800, "evaluate_every": 0, "checkpoint_every": 0})
        config.encoder.update(ENCODER)
        return config
    if variant not in ROWS:
        raise ValueError(f"Unknown row {variant!r}; choose one of encoder, {', '.join(ROWS)}.")
    recipe, changes = ROWS[variant]
    config = recipe.get_config("tiny")
    if config.family == "como":
        config.encoder.update(ENCODER)
        config.model.update({"idm_width": 96, "fdm_width": 96, "fdm_depth": 3})
    config.train.update({"num_steps": NUM_STEPS, "evaluate_every": 0, "checkpoint_every": 0})
    config.update_from_flattened_dict(changes)
    return config
