"""Views when the user names none."""

from __future__ import annotations

import torch

from uda.data.domains import DomainData
from uda.data.tensor_views import FeatureViews, TensorViews
from uda.data.views import ImageViews, Views
from uda.errors import UDAError


def default_views(domains: list[DomainData]) -> Views:
    """Views by kind of input: photographs, small image arrays (brought to one size) or features."""
    kinds = {d.inputs.kind for d in domains}
    if len(kinds) > 1:
        raise UDAError(
            f"domains are of different kinds ({', '.join(sorted(kinds))}); "
            "set data.views to bring them together"
        )
    kind = kinds.pop()
    if kind == "files":
        return ImageViews()
    if kind == "features":
        return FeatureViews()
    shapes = [d.inputs.fetch(torch.zeros(1, dtype=torch.int64))[0].shape for d in domains]
    if len(set(shapes)) == 1:
        return TensorViews()
    return TensorViews(
        size=max(max(s[1:]) for s in shapes), channels=3 if any(s[0] == 3 for s in shapes) else 1
    )
