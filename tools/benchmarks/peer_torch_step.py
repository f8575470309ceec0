"""Times CoMo's train step beside the same model written plainly in PyTorch.

    python -m tools.benchmarks.peer_torch_step --config configs/pretrain_como.py
    python -m tools.benchmarks.peer_torch_step --config configs/pretrain_como.py --pairs 256 --device cuda --rounds 1

Needs `pip install 'como_jax[torch]'`. Both train the frozen encoder's difference, Q-former and FDM on the pixel error
alone, by AdamW without clipping, so that both do the same work, but that PyTorch's Q-former also computes the unused
tokens of its last layer. First, parameters, FLOPs and, at a small size, loss and gradients are checked to be equal.
Then every row is measured in its own process, one at a time, all of them in turn in every round.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import traverse_util
from ml_collections import ConfigDict, config_flags

from como_jax import cli
from como_jax.data.clips import num_pairs, pair_spans
from como_jax.errors import ConfigError, RunError, UsageError
from como_jax.files import check_file_output, write_figures
from como_jax.motion.models import build_model
from como_jax.training.flops import train_flops
from como_jax.types import fake_frame_pairs

logger = logging.getLogger("como_jax.benchmarks.peer_torch_step")

ROWS = (
    "jax:float32",
    "torch:float32",
    "torch:float32:compile",
    "jax:bfloat16",
    "torch:bfloat16",
    "torch:bfloat16:compile",
    "jax:float32:data.instants=5",
    "jax:float32:data.instants=5:data.pair_span=4:data.min_gap_fraction=0.25",
)
# What both sides leave out, so that both do the same work.
PLAIN = {
    "data.instants": 2,
    "data.pair_span": 1,
    "data.min_gap_fraction": 1.0,
    "encoder.frozen": True,
    "model.motion_input": "difference",
    "model.residual": False,
    "model.perceptual_weight": 0.0,
    "model.tcl_weight": 0.0,
    "optim.clip_norm": 0.0,
    "optim.ema_decay": 0.0,
}
_SMALL = {
    **{"data.image_size": 32, "encoder.patch_size": 16, "encoder.width": 32, "encoder.depth": 2},
    **{"encoder.num_heads": 2, "model.idm_width": 24, "model.idm_depth": 2, "model.idm_heads": 2},
    **{"model.fdm_width": 24, "model.fdm_depth": 2, "model.fdm_heads": 2, "train.dtype": "float32"},
}
# What must be equal, and within which part of it.
_EQUAL = {
    "parameters": ("parameters", 0.0),
    "flops": ("FLOPs a pair, as counted in JAX and by PyTorch, of what PyTorch computes", 0.01),
    "loss": ("loss at a small size", 1e-5),
    "gradient_norm": ("norm of its gradients", 1e-4),
}
_GIB = 2**30

DescribeTorch = Callable[[ConfigDict, Mapping[str, np.ndarray] | None], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that is timed.

    Attributes:
      name: as on the command line.
      library: jax or torch.
      changes: of the config, as FIELD=VALUE.
      compile: whether by torch.compile.
    """

    name: str
    library: str
    changes: tuple[str, ...]
    compile: bool = False

    @classmethod
    def parse(cls, name: str) -> Row:
        """Reads jax:DTYPE[:FIELD=VALUE...] or torch:DTYPE[:compile].

        Raises:
          UsageError: it is neither.
        """
        library, _, rest = name.partition(":")
        dtype, *options = rest.split(":")
        if dtype in ("float32", "bfloat16"):
            changes = (f"train.dtype={dtype}", *options)
            if library == "jax" and all("=" in option for option in options):
                return cls(name, library, changes)
            if library == "torch" and options in ([], ["compile"]):
                return cls(name, library, changes[:1], compile=bool(options))
        raise UsageError(f"--rows {name!r} must be jax:DTYPE[:FIELD=VALUE...] or torch:DTYPE[:compile].")

    @property
    def pairs_of_clip(self) -> int:
        """Number of pairs that share the encoded frames of a clip."""
        values: dict[str, Any] = {**PLAIN, **dict(change.split("=", 1) for change in self.changes)}
        spans = pair_spans(int(values["data.pair_span"]), float(values["data.min_gap_fraction"]))
        return num_pairs(int(values["data.instants"]), spans)


def plain(config: ConfigDict) -> ConfigDict:
    """The config with only those parts that both sides train."""
    if config.family != "como":
        raise ConfigError(f"config.family {config.family!r} has no counterpart in PyTorch; take a recipe of como.")
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(PLAIN)
    return config


def check_equal(config: ConfigDict, describe_torch: DescribeTorch) -> list[str]:
    """Checks that both sides are the same model, for a config after `plain`, and returns lines that say so.

    Args:
      config: that is measured.
      describe_torch: takes a config, and arrays or None, and gives `torch_como.describe_model` of them.

    Raises:
      RunError: they are not.
    """
    small = config.copy_and_resolve_references()
    small.update_from_flattened_dict(_SMALL)
    shapes = jax.eval_shape(build_model(config).init, jax.random.key(0))
    arrays, learned = reference(small)
    ours = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)), "flops": torch_flops(config), **learned}
    return compare(ours, describe_torch(small, arrays) | describe_torch(config, None))


def compare(ours: Mapping[str, float], theirs: Mapping[str, float]) -> list[str]:
    """One line for each figure of both sides; raises RunError where they are not equal."""
    lines = []
    for name, (title, tolerance) in _EQUAL.items():
        line = f"{title}: JAX {ours[name]:.7g}, PyTorch {theirs[name]:.7g}"
        if abs(ours[name] - theirs[name]) > tolerance * abs(ours[name]):
            raise RunError(f"The two sides differ in {line}.")
        lines.append(line)
    return lines


def torch_flops(config: ConfigDict) -> float:
    """FLOPs of a pair, including those for the unused tokens of the Q-former's last layer."""
    model, encoder = config.model, config.encoder
    tokens = model.num_queries + 2 * ((config.data.image_size // encoder.patch_size) ** 2 + 1) + 1
    # Of every such token query, projection and MLP, 10 matrices of width x width, and its attention to all tokens.
    forward = (tokens - model.num_queries) * (20 * model.idm_width**2 + 4 * tokens * model.idm_width)
    return train_flops(config) + 3 * forward


def reference(config: ConfigDict) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Parameters by path, and "frames"; and what JAX computes from them, the loss and the norm of its gradient."""
    model = build_model(config)
    frames = fake_frame_pairs(4, 2, config.data.image_size, offset=False)

    @jax.jit
    def run(key: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        # Biases and tokens too, which start at 0, must be told apart.
        params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), model.init(key))
        loss, gradients = jax.value_and_grad(lambda params: model.bind(params).loss(frames, key).total)(params)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)))
        return params, loss, norm

    params, loss, norm = run(jax.random.key(0))
    flat = {"/".join(map(str, path)): np.asarray(x) for path, x in traverse_util.flatten_dict(params).items()}
    return {**flat, "frames": np.asarray(frames.frames)}, {"loss": float(loss), "gradient_norm": float(norm)}


class Processes:
    """Runs both sides as commands, one at a time, on a config with overrides."""

    def __init__(self, config_file: str, overrides: Mapping[str, Any], folder: Path, device: str):
        self._config_file, self._folder, self._device = config_file, folder, device
        self._overrides = [f"{name}={value}" for name, value in {**overrides, **PLAIN}.items()]
        self._environment = {
            # Compiled once for all rounds.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            **os.environ,
            "JAX_PLATFORMS": device,
        }

    def measure(self, row: Row, pairs: int, options: Sequence[str]) -> dict[str, Any]:
        """Measures one row, with a number of pairs per step, and returns its figures."""
        changes = [f"data.batch_size={max(1, pairs // row.pairs_of_clip)}", *row.changes]
        if row.library == "torch":
            return self._run("torch_como", changes, [*options, f"--device={self._device}", f"--compile={row.compile}"])
        found = self._run("train_step", changes, options)
        figures = found["measurements"][0]
        return {**figures, "version": found["machine"], "flops": figures["flops"] / figures["unit"]["per_element"]}

    def describe_torch(self, config: ConfigDict, arrays: Mapping[str, np.ndarray] | None) -> dict[str, float]:
        """See `torch_como.describe_model`; `config` may differ from the command's in sizes alone."""
        options, names = ["--describe"], [*_SMALL]
        if arrays is not None:
            file = self._folder / "arrays.npz"
            np.savez(file, **dict(arrays))
            options.append(f"--arrays={file}")
        values = dict(zip(names, (_field(config, name) for name in names), strict=True))
        return self._run("torch_como", [f"{name}={value}" for name, value in values.items()], options)

    def _run(self, module: str, changes: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
        out = self._folder / "figures.json"
        out.unlink(missing_ok=True)
        overrides = [f"--config.{change}" for change in (*self._overrides, *changes)]
        command = [sys.executable, "-m", f"tools.benchmarks.{module}", f"--config={self._config_file}", *overrides]
        done = subprocess.run(
            [*command, *options, f"--json={out}"], env=self._environment, capture_output=True, text=True
        )
        if done.returncode or not out.exists():
            raise RunError(last_error(done.stderr) or f"tools.benchmarks.{module} ended with status {done.returncode}")
        return json.loads(out.read_text())


def last_error(text: str) -> str:
    """The line in which a command names its error, which is not always the last one."""
    found = re.findall(r"^(?:error|[\w.]*(?:Error|Exception|Interrupt)): .*$", text, re.MULTILINE)
    return found[-1].removeprefix("error: ") if found else ""


def _field(config: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


@dataclasses.dataclass
class Found:
    """Figures of one row so far.

    Attributes:
      rates: pairs a second of the windows of every round.
      flops: of a pair.
      peak_bytes, peak_of: most memory in use, of the device or of the process.
      failed: why there are no figures.
    """

    rates: list[list[float]] = dataclasses.field(default_factory=list)
    flops: float = 0.0
    peak_bytes: int = 0
    peak_of: str = ""
    failed: str = ""

    def add(self, figures: Mapping[str, Any]) -> None:
        """One round."""
        self.rates.append(figures["rates"])
        self.flops = figures["flops"]
        self.peak_bytes, self.peak_of = max(self.peak_bytes, figures["peak_bytes"]), figures["peak_of"]

    @property
    def by_round(self) -> list[float]:
        """Median of each round."""
        return [statistics.median(rates) for rates in self.rates]


def table(found: Mapping[str, Found]) -> list[str]:
    """Markdown: rates, work and memory of every row."""
    lines = ["| row | pairs/s, median (range) | GFLOP a pair | TFLOP/s | peak, GiB |", "|---|---|---|---|---|"]
    for name, figures in found.items():
        if figures.failed:
            lines.append(f"| {name} | failed: {figures.failed} | | | |")
            continue
        rates = [rate for rates in figures.rates for rate in rates]
        median = statistics.median(rates)
        lines.append(
            f"| {name} | {median:.4g} ({min(rates):.4g}-{max(rates):.4g}) | {figures.flops / 1e9:.4g} | "
            f"{median * figures.flops / 1e12:.4g} | {figures.peak_bytes / _GIB:.3g} ({figures.peak_of}) |"
        )
    return lines


def ratios(found: Mapping[str, Found]) -> list[str]:
    """How many times as fast each row of JAX is as each of PyTorch, median and range over rounds."""
    lines = []
    for ours, mine in found.items():
        for theirs, other in found.items():
            if not (ours.startswith("jax") and theirs.startswith("torch")) or mine.failed or other.failed:
                continue
            values = [a / b for a, b in zip(mine.by_round, other.by_round, strict=True)]
            spread = f"({min(values):.3g}-{max(values):.3g})"
            lines.append(f"{ours} / {theirs}: {statistics.median(values):.3g} {spread}")
    return lines


def measure_all(
    measure: Callable[[Row], Mapping[str, Any]], rows: Sequence[Row], rounds: int
) -> tuple[dict[str, Found], dict[str, str]]:
    """Measures all rows, which take turns; returns their figures, and the version of each library."""
    found: dict[str, Found] = {row.name: Found() for row in rows}
    versions: dict[str, str] = {}
    for number in range(rounds):
        for row in rows:
            figures = found[row.name]
            if figures.failed:
                continue
            try:
                measured = measure(row)
            except RunError as error:
                # The other rows go on.
                figures.failed = str(error)
                logger.warning("%s failed: %s", row.name, error)
                continue
            figures.add(measured)
            versions[row.library] = measured["version"]
            logger.info("round %d, %s: %.4g pairs/s", number + 1, row.name, figures.by_round[-1])
    return found, versions


def define_flags() -> None:
    """Defines the flags of the command."""
    config_flags.DEFINE_config_file("config", "configs/pretrain_como.py", "Recipe of CoMo, whose sizes to take.")
    flags.DEFINE_list("rows", list(ROWS), "jax:DTYPE[:FIELD=VALUE...] or torch:DTYPE[:compile], in this order.")
    flags.DEFINE_integer("pairs", 8, "Of a step.", lower_bound=1)
    flags.DEFINE_integer("rounds", 2, "Times that every row is measured, in turn.", lower_bound=1)
    flags.DEFINE_integer("windows", 2, "Windows that a row is timed for in a round.", lower_bound=1)
    flags.DEFINE_integer("steps", 2, "Steps of a window; the device is waited for at its end alone.", lower_bound=1)
    flags.DEFINE_integer("warm_up", 2, "Steps before, which are not timed.", lower_bound=1)
    flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "Of both libraries.")
    flags.DEFINE_string("json", None, "File that gets the figures.")


def main(arguments: Sequence[str]) -> None:
    """Prints the checks, the table and the ratios."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    rows = [Row.parse(name) for name in given.rows]
    # This process measures nothing, and leaves the GPU to those that do.
    jax.config.update("jax_platforms", "cpu")
    config, holder = plain(given.config), given["config"]
    config_file, overrides = config_flags.get_config_filename(holder), config_flags.get_override_values(holder)
    options = [f"--{name}={given[name].value}" for name in ("windows", "steps", "warm_up")]
    if given.json:
        check_file_output(given.json)
    with tempfile.TemporaryDirectory() as folder:
        processes = Processes(config_file, overrides, Path(folder), given.device)
        print("\n".join(check_equal(config, processes.describe_torch)), flush=True)
        flops = {"flops": torch_flops(config)}
        # What JAX says of itself comes after.
        found, versions = measure_all(
            lambda row: flops | processes.measure(row, given.pairs, options), rows, given.rounds
        )
    print(f"\n{'; '.join(versions.values())}")
    print(f"{given.pairs} pairs a step of {config.data.image_size} px, {given.rounds} rounds in turn")
    print("\n".join([*table(found), *ratios(found)]))
    if given.json:
        figures = {name: dataclasses.asdict(value) for name, value in found.items()}
        write_figures(given.json, {"versions": versions, "config": config.to_dict(), "rows": figures})


if __name__ == "__main__":
    define_flags()
    cli.run(main)
