"""Arrays in one file or one file a domain: .npz, .npy, .pt, .mat."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from uda.data.domains import DomainData, TensorInputs
from uda.data.multilabel import multi_hot
from uda.data.readers import Reader, labels_by_name, natural_order
from uda.errors import UDAError, nearest

_FIELD = "{domain}"


class Arrays(Reader):
    """Images or features stored as arrays under keys that hold the domain's name.

    ``Arrays("digits.npz")`` finds the domains ``mnist_train``, ``usps_train``, ... behind the keys
    ``mnist_train_x``. With ``{domain}`` in the path there is one file a domain: ``Arrays("{domain}_SURF.mat",
    x_key="fts", y_key="labels")``. A domain without its y key is unlabelled. If the file has ``classes``,
    whole-number labels index it; else the labels as text are the class names.

    Args:
        path: a .npz, .pt (a dict of tensors) or .mat file; ``{domain}`` stands for the domain's name.
        x_key: key of the inputs.
        y_key: key of the labels.
        kind: ``images`` ([N, H, W], [N, H, W, C] or [N, C, H, W]; uint8 is scaled to [0, 1]) or ``features``
            ([N, ...]).
        layout: where the channels of 4-dimensional images are; ``auto`` tells by which axis is 1, 3 or 4
            long.
        classes_key: key of the class names.
        normalise: of features, by domain and without labels: ``l2`` rows to length 1, ``zscore`` features to
            mean 0 and variance 1 (usual for SURF), or ``none``.
        multi_label: labels are 0 or 1 of shape [N, C], a column a class (docs/settings.md).
    """

    def __init__(
        self,
        path: str,
        x_key: str = "{domain}_x",
        y_key: str = "{domain}_y",
        kind: Literal["images", "features"] = "images",
        layout: Literal["auto", "channels_first", "channels_last"] = "auto",
        classes_key: str = "classes",
        normalise: Literal["none", "l2", "zscore"] = "none",
        multi_label: bool = False,
    ) -> None:
        path = os.path.expanduser(str(path))
        if _FIELD not in path and _FIELD not in x_key:
            raise UDAError(
                f"Arrays: put {_FIELD} into x_key or path; without it there is no telling domains apart"
            )
        for name, value, allowed in (
            ("kind", kind, ("images", "features")),
            ("layout", layout, ("auto", "channels_first", "channels_last")),
            ("normalise", normalise, ("none", "l2", "zscore")),
        ):
            if value not in allowed:
                raise UDAError(f"Arrays: {name} {value!r} must be one of {', '.join(allowed)}")
        self.path = path
        self.x_key, self.y_key, self.classes_key = x_key, y_key, classes_key
        self.kind, self.layout, self.normalise, self.multi_label = kind, layout, normalise, multi_label

    def domains(self) -> list[str]:
        """Names of the domains."""
        if _FIELD in self.path:
            files = glob.glob(self.path.replace(_FIELD, "*"))
            return sorted(_match(self.path, f) for f in files if _match(self.path, f))
        return natural_order(n for n in (_match(self.x_key, k) for k in _open(self.path)) if n)

    def place(self, domain: str) -> str:
        """The file, or the key, that is not there."""
        if _FIELD in self.path:
            return f"no file {self.path.replace(_FIELD, domain)!r}"
        return f"no key {self.x_key.replace(_FIELD, domain)!r} in {self.path!r}"

    def read(self, domain: str) -> DomainData:
        """Read one domain."""
        path = self.path.replace(_FIELD, domain)
        data = _open(path)
        x_key, y_key = self.x_key.replace(_FIELD, domain), self.y_key.replace(_FIELD, domain)
        if x_key not in data:
            raise UDAError(f"{path!r} has no key {x_key!r} for domain {domain!r}. {nearest(x_key, data)}")
        x = _array(data[x_key], f"{x_key!r} in {path!r}")
        labels, names = None, []
        if y_key in data:
            y = _array(data[y_key], f"{y_key!r} in {path!r}")
            y = y if self.multi_label else _flat(y)
            if len(y) != len(x):
                raise UDAError(
                    f"{path!r}: {x_key!r} has {len(x)} rows but {y_key!r} has {len(y)}; "
                    "they must have equally many"
                )
            given = _flat(np.asarray(data[self.classes_key])) if self.classes_key in data else None
            labels, names = (multi_hot if self.multi_label else _named_labels)(y, given, f"{y_key!r} in {path!r}")
        _check_finite(x, x_key, path)
        inputs = TensorInputs(self._tensor(x, x_key), self.kind)
        return DomainData(domain, inputs, labels, names, multi_label=self.multi_label)

    def _tensor(self, x: np.ndarray, key: str) -> Tensor:
        if self.kind == "images":
            return _channels_first(x, self.layout, key)
        if x.ndim < 2:
            raise UDAError(f"features {key!r} must have rows and columns [N, D], not shape {list(x.shape)}")
        if self.normalise == "none":
            return torch.from_numpy(np.ascontiguousarray(x))
        x = x.astype(np.float32)
        if self.normalise == "l2":
            x /= np.maximum(np.linalg.norm(x.reshape(len(x), -1), axis=1), 1e-12).reshape(
                -1, *[1] * (x.ndim - 1)
            )
        else:
            x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-6)
        return torch.from_numpy(np.ascontiguousarray(x))


def _match(pattern: str, text: str) -> str | None:
    before, _, after = pattern.partition(_FIELD)
    # A pattern may name the domain more than once, as in {domain}/{domain}.mat.
    after = re.escape(after).replace(re.escape(_FIELD), r"\1")
    found = re.fullmatch(re.escape(before) + "(.+?)" + after, text)
    return found.group(1) if found else None


def _open(path: str) -> Mapping[str, Any]:
    """Arrays of a file by key; .npz reads each when asked for."""
    if not os.path.isfile(path):
        raise UDAError(f"array file {path!r} does not exist")
    ending = os.path.splitext(path)[1].lower()
    try:
        if ending == ".npz":
            return np.load(path, allow_pickle=False)
        if ending in (".pt", ".pth"):
            data = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(data, dict):
                return data
            raise UDAError(f"{path!r} holds a {type(data).__name__}; a dict of tensors by key is needed")
        if ending == ".mat":
            from scipy.io import loadmat

            return {k: v for k, v in loadmat(path).items() if not k.startswith("__")}
    except UDAError:
        raise
    except NotImplementedError as e:
        raise UDAError(f"{path!r} is a MATLAB 7.3 file; save it again with '-v7' or as .npz") from e
    except Exception as e:
        raise UDAError(f"cannot read array file {path!r}: {type(e).__name__}: {e}") from e
    raise UDAError(f"array file {path!r} must end in .npz, .pt, .pth or .mat")


def _array(value: Any, where: str) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.numpy()
    value = np.asarray(value)
    if value.dtype == object or value.ndim == 0:
        raise UDAError(f"{where} is no plain array (type {value.dtype}, shape {list(value.shape)})")
    return value


def _flat(y: np.ndarray) -> np.ndarray:
    return y.reshape(-1) if y.ndim == 2 and 1 in y.shape else y


def _named_labels(y: np.ndarray, given: np.ndarray | None, where: str) -> tuple[Tensor, list[str]]:
    if y.ndim != 1:
        raise UDAError(f"labels {where} must be one a row, not shape {list(y.shape)}; of several: multi_label: true")
    if y.dtype.kind == "f":
        if not np.array_equal(y, np.round(y)):
            raise UDAError(f"labels {where} are not whole numbers")
        y = y.astype(np.int64)
    if y.dtype.kind in "iub" and (y.astype(np.int64) < 0).any():
        raise UDAError(f"labels {where} have negative values; leave the key away for an unlabelled domain")
    if given is None or y.dtype.kind not in "iub":
        # By value, not row by row: text labels of a large domain would take seconds.
        values, inverse = np.unique(y, return_inverse=True)
        ids, names = labels_by_name([str(v.item() if hasattr(v, "item") else v).strip() for v in values])
        return ids[torch.from_numpy(inverse.astype(np.int64))], names
    if len(y) and int(y.max()) >= len(given):
        raise UDAError(f"labels {where} go up to {int(y.max())}, but there are only {len(given)} class names")
    return torch.from_numpy(y.astype(np.int64)), [str(n) for n in given]


def _check_finite(x: np.ndarray, key: str, path: str) -> None:
    if x.dtype.kind != "f" or not x.size:
        return
    bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if bad.any():
        rows = np.flatnonzero(bad)
        raise UDAError(
            f"{path!r}: {key!r} has NaN or infinite values in {len(rows)} row(s), "
            f"the first is row {rows[0]}; "
            "remove or impute them"
        )


def _channels_first(x: np.ndarray, layout: str, key: str) -> Tensor:
    """Images as [N, C, H, W], uint8 kept, floats as float32."""
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim != 4:
        raise UDAError(
            f"images {key!r} must have shape [N, H, W], [N, H, W, C] or [N, C, H, W], not {list(x.shape)}; "
            "for feature rows set kind: features"
        )
    elif layout == "channels_last" or (
        layout == "auto" and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3)
    ):
        x = x.transpose(0, 3, 1, 2)
    if x.shape[1] not in (1, 3, 4):
        raise UDAError(
            f"images {key!r} of shape {list(x.shape)} have no axis of 1, 3 or 4 channels; set layout"
        )
    x = x[:, :3] if x.shape[1] == 4 else x
    if x.dtype != np.uint8:
        if x.dtype.kind != "f":
            raise UDAError(f"images {key!r} must be uint8 (0 to 255) or floats (0 to 1), not {x.dtype}")
        x = x.astype(np.float32)
        if x.size and (x.min() < -1e-3 or x.max() > 1 + 1e-3):
            raise UDAError(
                f"float images {key!r} must lie in [0, 1], not {x.min():g} to {x.max():g}; scale them"
            )
    return torch.from_numpy(np.ascontiguousarray(x))
