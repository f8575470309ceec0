"""All dataset builders by name, and their settings from what a user gave."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from como_jax.convert.builder import EpisodeBuilder
from como_jax.convert.calvin.builder import Calvin
from como_jax.convert.lerobot.builder import LeRobot
from como_jax.convert.libero.builder import Libero
from como_jax.convert.libero_sim.builder import LiberoDemonstrations
from como_jax.convert.metaworld.builder import MetaWorldDemonstrations
from como_jax.convert.npz.builder import Npz
from como_jax.convert.procgen.builder import Procgen
from como_jax.convert.rlds.builder import Rlds
from como_jax.convert.settings import Settings
from como_jax.convert.tabletop.builder import TabletopDemonstrations
from como_jax.convert.video_folder.builder import VideoFolder
from como_jax.errors import ConversionError

BUILDERS: dict[str, type[EpisodeBuilder]] = {
    "calvin": Calvin,
    "lerobot": LeRobot,
    "libero": Libero,
    "libero_sim": LiberoDemonstrations,
    "metaworld": MetaWorldDemonstrations,
    "npz": Npz,
    "procgen": Procgen,
    "rlds": Rlds,
    "tabletop": TabletopDemonstrations,
    "video_folder": VideoFolder,
}


def make_settings(builder: str, given: Mapping[str, Any]) -> Settings:
    """Makes the settings of a builder; what is not given has the builder's default.

    Raises:
      ConversionError: there is no such builder or setting, or a setting without a default is not given.
    """
    if builder not in BUILDERS:
        raise ConversionError(f"unknown builder {builder!r}; there are {', '.join(BUILDERS)}")
    settings_class = BUILDERS[builder].settings_class
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    for name in given:
        if name not in fields:
            raise ConversionError(f"`{name}` does not apply to {builder}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in given:
            raise ConversionError(f"{builder} needs `{name}`: {field.metadata['help']}")
    return settings_class(**given)


def list_settings() -> dict[str, tuple[type, str]]:
    """Returns the type (bool, int, float, str or tuple) and the help text of every setting of any builder, by name."""
    kinds: dict[str, type] = {}
    texts: dict[str, dict[str, list[str]]] = {}
    for builder, hints in ((name, typing.get_type_hints(each.settings_class)) for name, each in BUILDERS.items()):
        for field in dataclasses.fields(BUILDERS[builder].settings_class):
            kinds[field.name] = _plain_type(hints[field.name])
            texts.setdefault(field.name, {}).setdefault(_describe(field), []).append(builder)
    return {
        name: (kind, "; ".join(_about(builders) + text for text, builders in texts[name].items()))
        for name, kind in kinds.items()
    }


def _plain_type(hint: Any) -> type:
    """Returns the type behind `X | None` and `tuple[X, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    return typing.get_origin(hint) or hint


def _describe(field: dataclasses.Field) -> str:
    text, default = field.metadata["help"], field.default
    if text.endswith("]") or default in (None, "", ()) or default is dataclasses.MISSING:
        return text
    return f"{text} [{','.join(default) if isinstance(default, tuple) else default}]"


def _about(builders: list[str]) -> str:
    return "" if len(builders) == len(BUILDERS) else f"{', '.join(builders)}: "
