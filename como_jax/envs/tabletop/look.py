"""How the tabletop looks: the switches for what makes real video hard."""

from dataclasses import dataclass

BACKGROUNDS = ("plain", "textured")
AGENTS = ("gripper", "hand")
MAX_DISTRACTORS = 8
MAX_CAMERA_SHAKE = 0.1


@dataclass(frozen=True)
class Look:
    """Appearance of the images; it never changes the physics.

    Attributes:
        background: "plain", or "textured": another table cloth and wall in each episode.
        distractors: number of things that wander about without being part of the task, 0 to 8.
        camera_shake: largest shift of the image, as a share of its width, 0 to 0.1.
        lighting: strength of colour cast, uneven light and flicker, 0 to 1.
        agent: "gripper", a robot arm, or "hand", a human arm whose fingers do what the gripper does.

    Raises:
        ValueError: if a value is out of range.
    """

    background: str = "plain"
    distractors: int = 0
    camera_shake: float = 0.0
    lighting: float = 0.0
    agent: str = "gripper"

    def __post_init__(self) -> None:
        for name, choices in (("background", BACKGROUNDS), ("agent", AGENTS)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if not isinstance(self.distractors, int):
            raise ValueError(f"distractors must be an integer, got {self.distractors!r}")
        limits = {"distractors": MAX_DISTRACTORS, "camera_shake": MAX_CAMERA_SHAKE, "lighting": 1.0}
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise ValueError(f"{name} must lie between 0 and {limit}, got {value!r}")


PLAIN = Look()
"""A clean table and nothing that moves but the robot."""
HARD = Look(background="textured", distractors=3, camera_shake=0.02, lighting=0.6)
"""Every disturbance switched on."""
MOVING = Look(distractors=3, camera_shake=0.02)
"""What moves besides the robot, on a clean table: distractors and the camera."""
HUMAN = Look(agent="hand")
"""A human hand in place of the gripper."""
LOOKS = {"plain": PLAIN, "moving": MOVING, "hard": HARD, "human": HUMAN}
"""By the name that commands use."""
