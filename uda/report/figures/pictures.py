"""Pictures in a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from uda.report.style import Theme, new_figure


def gallery(theme: Theme, images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 6) -> Any:
    """Pictures with a caption each, in rows."""
    rows = -(-len(images) // columns)
    figure, axes = new_figure(1.35 * columns, 1.75 * rows, nrows=rows, ncols=columns, squeeze=False)
    for i, place in enumerate(axes.flat):
        place.axis("off")
        if i < len(images):
            place.imshow(images[i], interpolation="nearest" if max(images[i].shape) < 64 else "antialiased")
            place.set_title(captions[i], fontsize=7, loc="center", fontweight="normal")
    return figure
