"""All dataset builders by name, and their settings from what a user gave."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from como_jax.convert.builder import EpisodeBuilder, Settings
from como_jax.convert.calvin.builder import Calvin
from como_jax.convert.lerobot.builder import LeRobot
from como_jax.convert.libero.builder import Libero
from como_jax.convert.metaworld.builder import MetaWorldDemonstrations
from como_jax.convert.npz.builder import Npz
from como_jax.convert.procgen.builder import Procgen
from como_jax.convert.rlds.builder import Rlds
from como_jax.convert.tabletop.builder import TabletopDemonstrations
from como_jax.convert.video_folder.builder import VideoFolder
from como_jax.errors import ConversionError

BUILDERS: dict[str, type[EpisodeBuilder]] = {
    "calvin": Calvin,
    "lerobot": LeRobot,
    "libero": Libero,
    "metaworld": MetaWorldDemonstrations,
    "npz": Npz,
    "procgen": Procgen,
    "rlds": Rlds,
    "tabletop": TabletopDemonstrations,
    "video_folder": VideoFolder,
}


def make_settings(builder: str, given: Mapping[str, Any]) -> Settings:
    """Settings of a builder; what was not given has the builder's default.

    Raises:
      ConversionError: the builder is unknown, does not know a setting that was given, or needs one that was
        not.
    """
    if builder not in BUILDERS:
        raise ConversionError(f"unknown builder {builder!r}; there are {', '.join(BUILDERS)}")
    settings_class = BUILDERS[builder].settings_class
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    for name in given:
        if name not in fields:
            raise ConversionError(f"--{name} does not apply to {builder}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in given:
            raise ConversionError(f"{builder} needs --{name}{_help(field)}")
    return settings_class(**given)


def _help(field: dataclasses.Field) -> str:
    return f": {field.metadata['help']}" if "help" in field.metadata else ""
