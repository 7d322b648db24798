"""Methods compose: any aligner, network, pseudo-labeller, refiner and weigher of ``configs/methods`` train together."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

import uda
from uda.data import DataModule
from uda.discovery import registry
from uda.nn import SmallCNN
from uda.optim import Constant
from uda.testing import TinyTask

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("network", "align", "penalty", "pseudo", "refine", "smooth", "weights", "weigh", "reject", "generalise")
SMALL = {"hidden": 16, "random_width": 16}  # of discriminators and the like
ANY_ALIGNER = {
    "FixedWeights": {"weights": {"classification": 0.5}},
    "UncertaintyWeights": {"objectives": ["classification"]},
}


@functools.cache  # reading a hundred overlays takes longer than a short training
def components() -> dict[str, dict[str, tuple[dict, str]]]:
    """By kind and name: a plugin as the overlays write it, and how it wants the domains passed."""
    out: dict[str, dict[str, tuple[dict, str]]] = {kind: {} for kind in KINDS}
    for path in sorted((ROOT / "configs" / "methods").glob("*.yaml")):
        if "_multi_source_only.yaml" in path.read_text():  # refuses the one source of the task here
            continue
        model = yaml.safe_load(path.read_text())["model"]
        for key, entry in model["plugins"].items():
            if key == "adapt":  # has no part in training
                continue
            entry = copy.deepcopy(entry)
            given, cls = entry.setdefault("init_args", {}), registry().get(entry["class_path"])
            given.update({k: v for k, v in SMALL.items() if k in given or k in cls.__init__.__code__.co_varnames})
            needs = getattr(cls, "data_needs", None)  # a run without sources leaves nothing to align
            if "source-free" in cls.settings and needs is not None and not needs(cls(**given)).source:
                continue
            given.update(ANY_ALIGNER.get(entry["class_path"], {}))  # where the overlay names DANN's objective
            known = [e for e, _ in out[key].values()]
            if entry not in known:
                out[key][f"{path.stem}.{key}"] = (entry, model.get("forward_mode", "joint"))
    return out


def manual(entry: dict) -> bool:
    return registry().get(entry["class_path"]).manual


def combinations(count: int, seed: int) -> list[dict[str, str]]:
    """``count`` combinations that meet each component at least once, where ``count`` allows it.

    A kind may be left out. Two plugins that both own the optimisers exclude each other; who has to leave comes next.
    """
    parts, draw = components(), random.Random(seed)

    def deck(names: list[str]) -> Iterator[str]:
        while True:
            yield from draw.sample([*names, ""], len(names) + 1)

    decks = {kind: deck(list(names)) for kind, names in parts.items()}
    left: dict[str, list[str]] = {kind: [] for kind in KINDS}
    out = []
    while len(out) < count:
        drawn = {kind: left[kind].pop(0) if left[kind] else next(decks[kind]) for kind in KINDS}
        chosen = {kind: name for kind, name in drawn.items() if name}
        owners = [name for kind, name in chosen.items() if manual(parts[kind][name][0])]
        if owners and (len(owners) > 1 or "weigh" in chosen):
            for kind in [k for k, name in chosen.items() if name in owners[1:] or k == "weigh"]:
                if kind in chosen:
                    left[kind].append(chosen.pop(kind))
        trains = next(name for name in parts["refine"] if name.startswith("pseudo_label"))
        if "pseudo" in chosen:  # a label without a method that trains on it does nothing
            chosen.setdefault("refine", trains)
        elif chosen.get("refine") == trains:
            chosen["pseudo"] = next(iter(parts["pseudo"]))
        out.append(chosen)
    return out


def label(chosen: dict[str, str]) -> str:
    return "+".join(chosen.values()) or "source_only"


def train(chosen: dict[str, str], folder: Path, plain: bool = False) -> tuple[uda.UDA, L.Trainer]:
    """Two epochs in bfloat16, two batches a step; ``plain``: without the plugins, on the same data."""
    parts = components()
    used = {kind: copy.deepcopy(parts[kind][name]) for kind, name in chosen.items()}
    torch.manual_seed(0)
    model = uda.UDA(
        SmallCNN(1, (4, 8)),
        {kind: entry for kind, (entry, _) in used.items()},
        bottleneck=8,
        forward_mode="separate" if any(mode == "separate" for _, mode in used.values()) else "joint",
        optimizer=lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9),
        schedule=Constant(),
        manual_accumulate=2 if (owned := any(manual(e) for e, _ in used.values())) else 1,
    )
    data = DataModule(
        TinyTask("images"), source="source", target="target", batch_size=8, epoch_steps=4, held_out_fraction=0.25,
        seed=5,
    )  # fmt: skip
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", precision="bf16-mixed", accumulate_grad_batches=1 if owned else 2,
        logger=False, log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, inference_mode=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, data)
    return model, trainer


def check(chosen: dict[str, str], folder: Path) -> None:
    model, trainer = train(chosen, folder)
    figures = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert all(torch.tensor(v).isfinite() for k, v in figures.items() if k.startswith("train/")), figures
    for name, value in model.named_parameters():
        assert bool(value.isfinite().all()), name
    for kind in {"align", "refine"} & set(chosen):  # each has its objective in the sum, under its own name
        assert any(k.startswith(f"train/{kind}/") for k in figures), (kind, sorted(figures))


LARGEST = max(map(len, components().values()))  # a deck of this kind, and the empty place, meets each component once
QUICK, MORE = combinations(24, seed=0), combinations(LARGEST + 1, seed=1)


@pytest.mark.parametrize("chosen", QUICK[:8], ids=label)
def test_sampled_combinations_train(chosen, tmp_path):
    check(chosen, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [*QUICK[8:], *MORE], ids=label)
def test_more_combinations_train(chosen, tmp_path):
    check(chosen, tmp_path)


def test_the_sample_meets_every_component():
    for kind, names in components().items():
        assert names
        assert set(names) <= {c.get(kind) for c in MORE}
