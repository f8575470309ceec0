"""Prints how many frames per second one core draws of the tabletop.

python -m tools.benchmarks.tabletop_render [--seconds 2]
"""

import argparse
import platform
import time

import cv2
import numpy as np

from como_jax.envs.tabletop import HARD, HUMAN, PLAIN, Look, Tabletop


def frames_per_second(image_size: int, look: Look, seconds: float) -> float:
    """Steps with rendering per second of wall time, episodes' starts included."""
    env = Tabletop("all", image_size=image_size, look=look)
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    frames, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 4))
        frames += 1
        if terminated or truncated:
            env.reset()
            frames += 1
    return frames / (time.perf_counter() - start)


def main() -> None:
    """Prints one line for each look and image size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each line")
    seconds = parser.parse_args().seconds
    cv2.setNumThreads(1)
    print(f"{platform.platform()}, {platform.machine()}, Python {platform.python_version()}")
    print(f"numpy {np.__version__}, opencv {cv2.__version__}, one thread")
    for name, look in (("PLAIN", PLAIN), ("HUMAN", HUMAN), ("HARD", HARD)):
        for size in (64, 224):
            print(f"{name:5} {size:3} px: {frames_per_second(size, look, seconds):6.0f} frames/s")


if __name__ == "__main__":
    main()
