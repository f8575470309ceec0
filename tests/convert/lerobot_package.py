"""Writes or reads a dataset with LeRobot's own package; runs in an environment that has it.

    python tests/convert/lerobot_package.py write FOLDER MAX_VIDEO_MEGABYTES
    python tests/convert/lerobot_package.py read FOLDER

`read` prints what it finds as JSON. `write` makes five episodes: every image is grey, 20 + 30 * episode + 4 * step,
actions are (step, episode), and the task alternates.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

LENGTHS = (5, 7, 4, 6, 9)
SIZES = {"observation.images.top": (64, 96, 3), "observation.images.wrist": (64, 64, 3)}


def write(folder: str, max_video_megabytes: float) -> None:
    """Writes the dataset, with as many video files as the limit of their size makes it need."""
    axes = ["height", "width", "channels"]
    features = {key: {"dtype": "video", "shape": size, "names": axes} for key, size in SIZES.items()}
    for key, count in (("observation.state", 3), ("action", 2), ("gripper", 1)):
        features[key] = {"dtype": "float32", "shape": (count,), "names": None}
    dataset = LeRobotDataset.create("test/data", fps=10, features=features, root=folder)
    dataset.meta.update_chunk_settings(chunks_size=2, video_files_size_in_mb=max_video_megabytes)
    for episode, length in enumerate(LENGTHS):
        for step in range(length):
            frame = {key: np.full(size, 20 + 30 * episode + 4 * step, np.uint8) for key, size in SIZES.items()}
            frame["observation.state"] = np.array([step / 2, 1, 2], np.float32)
            frame["action"] = np.array([step, episode], np.float32)
            frame["gripper"] = np.array([-step], np.float32)
            dataset.add_frame({**frame, "task": ("push", "pull")[episode % 2]})
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()


def read(folder: str) -> None:
    """Prints the actions and tasks of all steps, and the video files of all episodes."""
    dataset = LeRobotDataset("test/data", root=folder)
    steps = dataset.hf_dataset.with_format("numpy")[:]
    videos = {
        key: [str(dataset.meta.get_video_file_path(episode, key)) for episode in range(dataset.num_episodes)]
        for key in dataset.meta.video_keys
    }
    tasks = [dataset.meta.tasks.iloc[int(index)].name for index in steps["task_index"]]
    print(json.dumps({"actions": np.stack(steps["action"]).tolist(), "tasks": tasks, "videos": videos}))


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2], float(sys.argv[3]))
    else:
        read(sys.argv[2])
