"""Pages for a browser that refer to nothing outside their one file: a template, figures and images."""

from __future__ import annotations

import base64
import io
from typing import Any

import jinja2
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from PIL import Image

from como_jax.files import check_file_output, write_text


def render_page(path: epath.PathLike, template: epath.PathLike, **values: Any) -> None:
    """Writes the page that a Jinja template makes of these values; a value that it lacks is an error.

    Raises:
      OutputError: see `check_file_output`.
    """
    check_file_output(path)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    write_text(path, environment.from_string(epath.Path(template).read_text()).render(**values))


def figure_uri(figure: Figure) -> str:
    """A figure as a PNG in a data URI."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    return _data_uri(file.getvalue())


def image_uri(image: np.ndarray) -> str:
    """Pixels, uint8 `[H, W, 3]` or floats in [0, 1], as a PNG in a data URI."""
    if image.dtype != np.uint8:
        image = np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return _data_uri(file.getvalue())


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
