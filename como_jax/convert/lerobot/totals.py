"""Compares what info.json counts with what there is."""

from __future__ import annotations

from como_jax.convert.lerobot.metadata import INFO_PATH, Metadata


def wrong_totals(metadata: Metadata) -> str:
    """Returns which numbers of info.json are not those of the metadata and of the files; empty if none is wrong."""
    info = metadata.info
    counted: dict[str, int] = {
        "total_episodes": len(metadata.episodes),
        "total_tasks": len(metadata.tasks),
        "total_videos": len(metadata.files.below("videos", ".mp4")),
        "total_chunks": len({path.rpartition("/")[0] for path in metadata.files.below("data", ".parquet")}),
    }
    lengths = [entry.length for entry in metadata.episodes]
    if None not in lengths:
        counted["total_frames"] = sum(length or 0 for length in lengths)
    wrong = [
        f"{name} is {info[name]}, and there are {count}"
        for name, count in counted.items()
        if name in info and info[name] != count
    ]
    return f"{INFO_PATH} counts wrongly: {'; '.join(wrong)}" if wrong else ""
