"""Builder that records demonstrations in the embedded tabletop environment."""

from __future__ import annotations

import dataclasses
import functools

from como_jax.convert.demonstrations import Demonstration, DemonstrationBuilder, DemonstrationSettings
from como_jax.convert.settings import number, one_of, setting
from como_jax.envs import tabletop
from como_jax.names import DEFAULT_CAMERA


@dataclasses.dataclass(frozen=True, kw_only=True)
class TabletopSettings(DemonstrationSettings):
    """Settings of `TabletopDemonstrations`."""

    image_size: int = setting(
        "side of the square images, as rendered", tabletop.IMAGE_SIZES[0], number(*tabletop.IMAGE_SIZES)
    )
    look: str = setting("plain, moving, hard or human", "plain", one_of(list(tabletop.LOOKS)))

    scene: str = setting(
        "drawn, with things of other colours in each episode, fixed, or recoloured", "drawn", one_of(tabletop.SCENES)
    )

    known_tasks = tabletop.TASKS


class TabletopDemonstrations(DemonstrationBuilder):
    """Demonstrations of reaching, pushing and the like."""

    settings_class = TabletopSettings
    settings: TabletopSettings
    cameras = (DEFAULT_CAMERA,)
    state_size = action_size = 4

    @property
    def environment(self) -> dict[str, str]:
        return {"family": "tabletop", "look": self.settings.look, "scene": self.settings.scene}

    def demonstrate(self, task: str, seed: int) -> Demonstration:
        found = tabletop.demonstrate(self._environments[task], seed, self.settings.noise)
        length = len(found.actions)
        return Demonstration(
            images={DEFAULT_CAMERA: found.images[:length]},
            states=found.states[:length],
            actions=found.actions,
            instruction=found.instruction,
            control_rate=float(tabletop.CONTROL_RATE_HZ),
            success=found.success,
        )

    @functools.cached_property
    def _environments(self) -> dict[str, tabletop.Tabletop]:
        look, size, scene = tabletop.LOOKS[self.settings.look], self.settings.image_size, self.settings.scene
        return {task: tabletop.Tabletop(task, size, look, scenes=scene) for task in tabletop.TASKS}
