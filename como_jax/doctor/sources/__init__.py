"""The kinds of datasets that the doctor can read, recognised by their files."""

from __future__ import annotations

from etils import epath

from como_jax.convert.lerobot.metadata import INFO_PATH
from como_jax.convert.rlds.dataset import find_dataset
from como_jax.doctor.sources.base import DatasetView
from como_jax.doctor.sources.converted import ConvertedView
from como_jax.doctor.sources.lerobot import LeRobotView
from como_jax.doctor.sources.rlds import RldsView
from como_jax.doctor.sources.videos import VideosView, find_videos
from como_jax.errors import ConversionError, DatasetError

_UNDERSTOOD = (
    "a dataset made by tools.datasets (dataset_info.json and episodes-*.parquet)",
    "an RLDS dataset (dataset_info.json and features.json, up to two levels down)",
    f"a LeRobot dataset ({INFO_PATH})",
    "a folder of videos",
)


def open_view(directory: epath.PathLike, control_rate: float | None = None) -> DatasetView:
    """Opens a dataset of any kind.

    Args:
      directory: the folder of the dataset.
      control_rate: Hz, for sources that do not record it; a converted dataset has its own.

    Raises:
      UsageError: the folder holds no dataset, or one that cannot be read.
    """
    directory = epath.Path(directory).expanduser()
    if not directory.is_dir():
        raise DatasetError(f"{directory} is not a folder.")
    if _is_converted(directory):
        return ConvertedView(directory, control_rate)
    if (directory / INFO_PATH).exists():
        return LeRobotView(directory, control_rate)
    try:
        inner = find_dataset(directory)
    except ConversionError as error:
        if "choose one" in str(error):
            raise
    else:
        return ConvertedView(inner, control_rate) if _is_converted(inner) else RldsView(inner, control_rate)
    if find_videos(directory):
        return VideosView(directory, control_rate)
    raise DatasetError(f"{directory} is not a dataset that can be read; there are: {'; '.join(_UNDERSTOOD)}.")


def _is_converted(directory: epath.Path) -> bool:
    return (directory / "dataset_info.json").exists() and any(directory.glob("episodes-*.parquet"))
