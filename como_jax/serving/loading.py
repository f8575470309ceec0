"""Loads the policy in a folder, by JAX or PyTorch, whichever the folder is made for."""

from __future__ import annotations

from etils import epath

from como_jax.errors import RunError
from como_jax.serving.policy import PolicyOptions, ServedPolicy
from como_jax.spec.exported import WEIGHTS_NAME
from como_jax.spec.interface import POLICY_FILE


def load_policy(directory: epath.PathLike, options: PolicyOptions) -> ServedPolicy:
    """Loads a policy and compiles it.

    Raises:
      RunError: the folder holds no policy.
      UsageError: the policy cannot be served, or not with these options.
    """
    path = epath.Path(directory)
    # Imported here, because a machine that serves exports may have no JAX, and one that serves runs no PyTorch.
    if (path / POLICY_FILE).exists():
        from como_jax.serving.jax_policy import JaxPolicy

        return JaxPolicy.load(path, options)
    if (path / WEIGHTS_NAME).exists():
        from como_jax.serving.torch_policy import TorchPolicy

        return TorchPolicy.load(path, options)
    raise RunError(
        f"{directory} holds no policy; name the directory of a run of experiments.train_policy, which has a "
        f"{POLICY_FILE}, or one that tools.export_torch wrote, which has a {WEIGHTS_NAME}."
    )
