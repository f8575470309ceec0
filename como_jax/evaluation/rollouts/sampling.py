"""How a trained policy draws its actions, which may differ from what its config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from como_jax.errors import ConfigError, closest

FIELDS = ("temperature", "generate_latents", "guidance", "flow_steps", "diffusion.sample_steps", "diffusion.eta")
"""Fields of `config.model` that change no parameter; each family has some of them."""


def with_sampling(config: ConfigDict, settings: Mapping[str, str]) -> ConfigDict:
    """The config of a policy with other settings of sampling.

    Args:
      config: of the run.
      settings: values as text, by name in `FIELDS`.

    Raises:
      ConfigError: a name that this policy does not have, or a value of another type.
    """
    config = config.copy_and_resolve_references()
    fields = {
        **config.model,
        **{f"diffusion.{name}": value for name, value in config.model.get("diffusion", {}).items()},
    }
    known = [name for name in FIELDS if name in fields]
    for name, text in settings.items():
        if name not in known:
            raise ConfigError(f"--sampling {name}: this policy has {', '.join(known)}{closest(name, known)}")
        config.update_from_flattened_dict({f"model.{name}": _parse(name, text, fields[name])})
    return config


def _parse(name: str, text: str, like: Any) -> Any:
    """A value of the type of `like`."""
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(like)(text)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"--sampling {name}={text}: the value must be as {like!r}.") from error
