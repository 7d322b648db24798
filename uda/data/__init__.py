"""Domains, readers, views, sampling and the data module.

Names are imported when first used, so that ``import uda.data`` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uda.data.arrays import Arrays
    from uda.data.classes import ClassSplit
    from uda.data.datamodule import DataModule
    from uda.data.domains import BadImage, DomainData, FileInputs, Inputs, TensorInputs
    from uda.data.generated import Digits, Generated
    from uda.data.halves import Halves
    from uda.data.readers import ImageFolders, ImageLists, Reader
    from uda.data.samplers import valid_rows
    from uda.data.sentences import Sentences
    from uda.data.several import Several
    from uda.data.tensor_views import FeatureViews, TensorViews
    from uda.data.texts import Texts
    from uda.data.torch_datasets import Datasets
    from uda.data.views import ImageViews, Views

#: public name -> module
_WHERE = {
    "Arrays": "arrays",
    "BadImage": "domains",
    "ClassSplit": "classes",
    "DataModule": "datamodule",
    "Datasets": "torch_datasets",
    "Digits": "generated",
    "DomainData": "domains",
    "FeatureViews": "tensor_views",
    "FileInputs": "domains",
    "Generated": "generated",
    "Halves": "halves",
    "ImageFolders": "readers",
    "ImageLists": "readers",
    "ImageViews": "views",
    "Inputs": "domains",
    "Reader": "readers",
    "Sentences": "sentences",
    "Several": "several",
    "TensorInputs": "domains",
    "TensorViews": "tensor_views",
    "Texts": "texts",
    "Views": "views",
    "valid_rows": "samplers",
}
__all__ = [
    "Arrays",
    "BadImage",
    "ClassSplit",
    "DataModule",
    "Datasets",
    "Digits",
    "DomainData",
    "FeatureViews",
    "FileInputs",
    "Generated",
    "Halves",
    "ImageFolders",
    "ImageLists",
    "ImageViews",
    "Inputs",
    "Reader",
    "Sentences",
    "Several",
    "TensorInputs",
    "TensorViews",
    "Texts",
    "Views",
    "valid_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'uda.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"uda.data.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
