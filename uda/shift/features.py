"""Samples of a task's domains as feature rows, without a target label."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uda.data import DataModule
from uda.data.domains import DomainData
from uda.data.pools import DomainPools, Pool
from uda.data.readers import Reader
from uda.described import describe
from uda.errors import UDAError
from uda.shift.duplicates import difference_hash, exact_hashes

#: Inputs of at most this many numbers are taken as they are where the backbone has no weights worth using.
RAW_SIZE = 4096
#: Images of at least this side get a perceptual hash.
HASHED_SIDE = 32
#: Exact duplicates are looked for in whole domains of up to this many numbers, else among the rows drawn.
HASHED_NUMBERS = 200_000_000


class WithoutLabels(Reader):
    """A reader that hands one domain over without its labels."""

    def __init__(self, reader: Reader, domain: str) -> None:
        self.reader, self.domain = reader, domain

    def domains(self) -> list[str]:
        """Names of the domains."""
        return self.reader.domains()

    def read(self, domain: str) -> DomainData:
        """One domain."""
        data = self.reader.read(domain)
        return replace(data, labels=None, class_names=[]) if domain == self.domain else data


def blind(datamodule: DataModule) -> DataModule:
    """A copy of a data module that knows no label of the target.

    Where ``classes`` are given, the labels decide which rows the target has (that is the task's definition), and for
    nothing else.
    """
    if not datamodule.source_names:
        raise UDAError("uda inspect compares a source with a target: data.source is missing.")
    out = copy.copy(datamodule)
    if out.classes is None:
        out.reader, out._task, out._shapes = WithoutLabels(out.reader, out.target_name), None, None
    return out


@dataclass
class Encoder:
    """What turns inputs ``[B, ...]`` into features ``[B, F]``, and logits ``[B, C]`` where it has a classifier.

    Attributes:
        origin: ``checkpoint``, ``pretrained``, ``given`` (a module of the caller's), ``random`` or ``inputs``.
        text: the same in words.
    """

    origin: str
    text: str
    encode: Callable[[Tensor], tuple[Tensor, Tensor | None]]


def encoder_of_checkpoint(model: Any, path: str) -> Encoder:
    """Features and logits of a trained model."""
    model.eval()

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        batch = model.batch(x.to(model.device))
        return batch.features, batch.logits

    return Encoder("checkpoint", f"features of the checkpoint {path}", encode)


def encoder_of_backbone(backbone: nn.Module, input_shape: tuple[int, ...], mode: str = "auto") -> Encoder:
    """Features of a backbone, or the inputs themselves.

    Args:
        backbone: gives ``[B, F]``.
        input_shape: of one input.
        mode: ``backbone``, ``inputs``, or ``auto``: the inputs where the backbone starts at random and an input
            has at most :data:`RAW_SIZE` numbers, else the backbone.
    """
    size, name = int(np.prod(input_shape)), type(backbone).__name__
    origin = origin_of(backbone)
    small_and_random = origin == "random" and size <= RAW_SIZE
    if origin == "inputs" or mode == "inputs" or (mode == "auto" and small_and_random):
        why = "" if origin == "inputs" else f" (the backbone {name} is not used: {_why(origin)})"
        return Encoder("inputs", f"the inputs themselves, {size} numbers each{why}", lambda x: (x.flatten(1), None))
    words = {
        "random": f"features of a randomly initialised {name}: distances in them mean little",
        "pretrained": f"features of {name} with its pretrained weights", "given": f"features of the given {name}",
    }  # fmt: skip
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    backbone.eval()
    return Encoder(origin, words[origin], lambda x: (backbone(x.to(device)), None))


def _why(origin: str) -> str:
    return "it starts at random" if origin == "random" else "inputs were asked for"


def origin_of(backbone: nn.Module) -> str:
    """``inputs`` (identity), ``pretrained``, ``random``, or ``given`` for a module that does not say."""
    from uda.nn.backbones import Backbone, EfficientNetLite, Identity

    if isinstance(backbone, Identity):
        return "inputs"
    if not isinstance(backbone, Backbone):
        return "given"
    arguments = describe(backbone)["init_args"]
    default = isinstance(backbone, EfficientNetLite)  # comes with its weights unless told otherwise
    loaded = arguments.get("pretrained", default) or arguments.get("weights") is not None
    return "pretrained" if loaded else "random"


@dataclass
class Sample:
    """Rows of a domain, drawn by a seed.

    Attributes:
        names: of the domain (of several sources).
        size: rows of the whole pool; ``features`` ``[n, F]`` of those drawn.
        logits: ``[n, C]`` or None; ``y``: class ids ``[n]``, None on a target.
        domain: number of the domain in ``names`` of each row.
        exact: a hash of each input; ``perceptual``: bool ``[n, 64]`` of images that are large enough.
    """

    names: list[str]
    size: int
    features: np.ndarray
    logits: np.ndarray | None
    y: np.ndarray | None
    exact: list[bytes]
    perceptual: np.ndarray | None
    domain: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.features)


def whole_pool(pools: DomainPools) -> Pool:
    """All rows of a domain, those held back included."""
    if pools.eval is pools.train:
        return pools.train
    return Pool(np.concatenate((pools.train.rows, pools.eval.rows)), torch.cat((pools.train.labels, pools.eval.labels)))


def draw(n: int, most: int, seed: int, labels: np.ndarray | None = None, least: int = 5) -> np.ndarray:
    """At most ``most`` of ``n`` positions, in rising order; by class with ``labels``, and ``least`` of each if it can.

    Args:
        labels: class ids ``[n]``; shares of the classes then stay as they are, but for rare ones.
    """
    rng = np.random.default_rng(seed)
    if n <= most:
        return np.arange(n)
    if labels is None:
        return np.sort(rng.permutation(n)[:most])
    out = []
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        count = max(round(most * len(members) / n), min(least, len(members)))
        out.append(rng.permutation(members)[:count])
    return np.sort(np.concatenate(out))


def hold_back(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and to hold back: of each class the same share, and one at least if it has two."""
    rng, back = np.random.default_rng(seed), []
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        back.append(members[:count])
    held = np.sort(np.concatenate(back))
    return np.setdiff1d(np.arange(len(labels)), held), held


@torch.no_grad()
def take(datamodule: DataModule, pools: DomainPools, pool: Pool, encoder: Encoder, most: int, seed: int) -> Sample:
    """Pass rows of a pool through an encoder: test view, no label of a target."""
    labels = None if pools.is_target else pool.labels.numpy()
    rows = draw(len(pool), most, seed, labels)
    part = Pool(pool.rows[rows], pool.labels[torch.from_numpy(rows)])
    loader = datamodule._feeds.sharded(pools, part, datamodule.eval_batch_size, labelled=not pools.is_target)
    features, logits, exact, perceptual = [], [], [], []
    for batch in loader:
        x = batch["x"]
        exact += exact_hashes(x)
        if x.ndim == 4 and min(x.shape[2:]) >= HASHED_SIDE:
            perceptual.append(difference_hash(x))
        f, z = encoder.encode(x)
        features.append(f.float().cpu().numpy())
        if z is not None:
            logits.append(z.float().cpu().numpy())
    return Sample(
        [pools.name], len(pool), np.concatenate(features), np.concatenate(logits) if logits else None,
        None if labels is None else labels[rows], exact, np.concatenate(perceptual) if perceptual else None,
        np.zeros(len(rows), dtype=np.int64),
    )  # fmt: skip


def all_hashes(datamodule: DataModule, pools: DomainPools, pool: Pool) -> list[bytes] | None:
    """A hash of every input of a pool held in memory, in pool order; None where that would mean decoding files."""
    inputs = pools.data.inputs
    if inputs.kind == "files" or len(pool) * int(np.prod(datamodule.input_shapes[pools.name])) > HASHED_NUMBERS:
        return None
    loader = datamodule._feeds.sharded(pools, pool, datamodule.eval_batch_size, labelled=False)
    return [h for batch in loader for h in exact_hashes(batch["x"])]


def join(samples: list[Sample]) -> Sample:
    """Several sources as one sample.

    Raises:
        UDAError: features of different widths.
    """
    if len({s.features.shape[1] for s in samples}) > 1:
        widths = ", ".join(f"{s.names[0]}: {s.features.shape[1]}" for s in samples)
        raise UDAError(f"uda inspect compares features of one width, and the domains have {widths}.")
    if len(samples) == 1:
        return samples[0]
    first = samples[0]
    return Sample(
        [s.names[0] for s in samples], sum(s.size for s in samples), np.concatenate([s.features for s in samples]),
        None if first.logits is None else np.concatenate([s.logits for s in samples]),
        np.concatenate([s.y for s in samples]), [h for s in samples for h in s.exact],
        None if first.perceptual is None else np.concatenate([s.perceptual for s in samples]),
        np.repeat(np.arange(len(samples)), [len(s) for s in samples]),
    )  # fmt: skip


def finite_rows(sample: Sample) -> tuple[Sample, int]:
    """The sample without rows that have a NaN or an infinite feature, and how many there were."""
    good = np.isfinite(sample.features).all(1)
    if sample.logits is not None:
        good &= np.isfinite(sample.logits).all(1)
    bad = int((~good).sum())
    if not bad:
        return sample, 0
    kept = np.flatnonzero(good)
    return replace(
        sample, features=sample.features[kept], logits=None if sample.logits is None else sample.logits[kept],
        y=None if sample.y is None else sample.y[kept], exact=[sample.exact[i] for i in kept],
        perceptual=None if sample.perceptual is None else sample.perceptual[kept], domain=sample.domain[kept],
    ), bad  # fmt: skip
