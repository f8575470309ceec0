"""The image of episodes."""

import numpy as np

from tools.benchmarks.libero_strip import join_rows


def test_a_row_goes_from_the_first_frame_of_an_episode_to_its_last() -> None:
    episodes = [np.broadcast_to(np.arange(length)[:, None, None, None], (length, 2, 3, 3)) for length in (9, 4)]
    strip = join_rows(episodes, columns=3)
    assert strip.shape == (4, 9, 3)
    assert strip[0, ::3, 0].tolist() == [0, 4, 8] and strip[2, ::3, 0].tolist() == [0, 2, 3]
