"""From a folder to the policy in it."""

from __future__ import annotations

from etils import epath

from como_jax.errors import RunError
from como_jax.serving.options import PolicyOptions
from como_jax.serving.policy import ServedPolicy

# Of `como_jax.policies.spec`, which cannot be imported without JAX, and of `como_jax.runtime_torch`.
_RUN_FILE, _EXPORT_FILE = "policy.json", "model.safetensors"


def load_policy(directory: epath.PathLike, options: PolicyOptions) -> ServedPolicy:
    """The policy that a folder holds, ready to act.

    Raises:
      RunError: it holds none.
      UsageError: what it holds cannot be served, or not with these options.
    """
    path = epath.Path(directory)
    if (path / _RUN_FILE).exists():
        # Each kind of folder needs a library that may not be installed where the others are served.
        from como_jax.serving.jax_policy import JaxPolicy

        return JaxPolicy.load(path, options)
    if (path / _EXPORT_FILE).exists():
        from como_jax.serving.torch_policy import TorchPolicy

        return TorchPolicy.load(path, options)
    raise RunError(
        f"--model {directory}: no policy there; it must be the directory of a run of experiments.train_policy, which "
        f"has a {_RUN_FILE}, or one of tools.export_torch, which has a {_EXPORT_FILE}."
    )
