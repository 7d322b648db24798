"""``inspect_shift``: every figure that a look before training gives, as plain data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import nn

from uda.data import DataModule
from uda.errors import UDAError
from uda.shift import advice, calibration, divergence, duplicates, features, priors
from uda.shift.features import Encoder, Sample


def inspect_shift(
    datamodule: DataModule,
    backbone: nn.Module | None = None,
    *,
    model: Any | None = None,
    checkpoint: str = "",
    mode: str = "auto",
    max_samples: int = 2000,
    held_out: float = 0.4,
    near: float = 0.98,
    permutations: int = 999,
    draws: int = 200,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Look at the shift between the sources and the target of a data module. Target labels are never read.

    Args:
        datamodule: of the task.
        backbone: features come from it (None: the inputs themselves).
        model: a trained :class:`uda.UDA` in its place; it then is the source classifier, too.
        checkpoint: where the model came from, for the report.
        mode: see :func:`uda.shift.features.encoder_of_backbone`.
        max_samples: rows drawn of the sources together, and of the target.
        held_out: share of the source rows on which the source classifier is tested (without ``model``).
        near: cosine above which two rows count as near duplicates.
        permutations: of the MMD test; ``draws``: of the bootstrap; ``seed``: of all draws.
        progress: called with what comes next.

    Returns:
        Figures by section (``data``, ``features``, ``classifier``, ``shift``, ``prior``, ``novelty``,
        ``duplicates``), then ``verdict``, ``statements`` and ``methods`` (see :func:`uda.shift.advice.advise`).

    Raises:
        UDAError: no source, or too few rows to say anything.
    """
    start = time.perf_counter()
    least_of = {"max_samples": (max_samples, 50), "permutations": (permutations, 99), "draws": (draws, 20)}
    for name, (value, least) in least_of.items():
        if value < least:
            raise UDAError(f"{name} must be {least} or more, got {value}.")
    if not 0.1 <= held_out <= 0.9 or not 0 < near < 1:
        raise UDAError(f"held_out must be from 0.1 to 0.9 and near between 0 and 1, got {held_out} and {near}.")
    data = features.blind(datamodule)
    progress("reading the domains")
    task = data.task
    if data.multi_label:
        raise UDAError(
            "the data is multi-label: a look at the shift takes one class a sample (its classifier, class shares and "
            "advice are of that). Train on the source alone, and `uda report` shows average precisions."
        )
    if model is not None:
        from uda import checks

        checks.take_spec(model, data)
        encoder = features.encoder_of_checkpoint(model, checkpoint)
    else:
        from uda.nn import make_backbone

        encoder = features.encoder_of_backbone(backbone or make_backbone("identity"), data.input_shape, mode)
    progress(f"computing {encoder.text}")
    trained = model is not None
    separate = all(p.eval is not p.train for p in task.sources)
    per_source = -(-max_samples // len(task.sources))
    samples = []
    for pools in task.sources:
        pool = pools.eval if trained else features.whole_pool(pools)
        samples.append(features.take(data, pools, pool, encoder, per_source, seed))
    source, bad_source = features.finite_rows(features.join(samples))
    target, bad_target = features.finite_rows(
        features.take(data, task.target, task.target.train, encoder, max_samples, seed)
    )
    if min(len(source), len(target)) < 20:
        raise UDAError(f"{len(source)} source and {len(target)} target rows are too few: 20 each are needed.")
    c = data.num_classes
    found: dict[str, Any] = {
        "data": _data(data, source, target),
        "features": {
            "origin": encoder.origin, "text": encoder.text,
            **_features(source, target), "bad_source": bad_source, "bad_target": bad_target,
        },
    }  # fmt: skip
    progress("training a source classifier" if not trained else "calibrating the checkpoint's classifier")
    rows, held, logits = _classify(source, target, encoder, c, held_out, seed)
    found["classifier"], probs = _classifier(source.y[held], logits, c)
    found["classifier"] |= {
        "origin": "checkpoint" if trained else "logistic regression", "train_rows": 0 if trained else len(rows),
        "held_out_rows": len(held), "separate": separate or not trained,
    }  # fmt: skip
    progress("telling the domains apart")
    found["shift"] = _shift(source, target, probs, permutations, seed)
    progress("estimating the target's class prior")
    found["prior"] = _prior(source, held, probs, logits, data.class_names, draws, seed)
    if found["prior"]["known"] and advice.shifted(found["shift"]):
        progress("telling the domains apart once more, with the source's classes in the estimated shares")
        found["matched"] = _matched(source, target, found["prior"], permutations, seed)
    base, compared = rows, held
    if not len(rows):  # a checkpoint's rows are all held out: one half of them is compared with the other
        base, compared = np.array_split(np.random.default_rng(seed).permutation(held), 2)
    found["novelty"] = divergence.novelty(source.features[base], source.features[compared], target.features)
    progress("looking for duplicates")
    found["duplicates"] = _duplicates(data, source, target, near)
    found |= advice.advise(found)
    found["settings"] = {
        "max_samples": max_samples, "held_out": held_out, "near": near, "permutations": permutations, "draws": draws,
        "seed": seed, "mode": mode, "checkpoint": checkpoint,
    }  # fmt: skip
    found["seconds"] = round(time.perf_counter() - start, 2)
    return found


def _data(data: DataModule, source: Sample, target: Sample) -> dict[str, Any]:
    task, names = data.task, data.class_names
    sources = {}
    for i, pools in enumerate(task.sources):
        pool = features.whole_pool(pools)
        counts = np.bincount(pool.labels.numpy(), minlength=len(names))
        sources[pools.name] = {
            "size": len(pool), "drawn": int((source.domain == i).sum()),
            "classes": dict(zip(names, map(int, counts), strict=True)),
        }  # fmt: skip
    return {
        "sources": sources,
        "target": {"name": data.target_name, "size": target.size, "drawn": len(target), "classes": None},
        "num_classes": len(names), "class_names": names,
        "note": "Target labels are not read; the target's classes are estimated in 'prior'.",
    }  # fmt: skip


def _features(source: Sample, target: Sample) -> dict[str, Any]:
    s, t = source.features, target.features
    flat_s, flat_t = s.std(0) < 1e-8, t.std(0) < 1e-8
    norms = [float(np.linalg.norm(x, axis=1).mean()) for x in (s, t)]
    centred = bool(np.abs(s.mean(0)).max() < 1e-4 and np.abs(t.mean(0)).max() < 1e-4)
    return {
        "dimension": s.shape[1], "constant_in_both": int((flat_s & flat_t).sum()),
        "constant_in_source_only": int((flat_s & ~flat_t).sum()),
        "constant_in_target_only": int((flat_t & ~flat_s).sum()),
        "mean_norm_source": norms[0], "mean_norm_target": norms[1], "centred_by_domain": centred,
    }  # fmt: skip


def _classify(
    source: Sample, target: Sample, encoder: Encoder, c: int, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Rows that a classifier was trained on, rows held out, and logits of these and of the target."""
    if source.logits is not None:
        return np.zeros(0, dtype=np.int64), np.arange(len(source)), (source.logits, target.logits)
    fit, held = features.hold_back(source.y, fraction, seed)
    classes = np.unique(source.y[fit])
    if len(classes) < 2:
        raise UDAError("the source has rows of one class only, so there is nothing to classify.")
    from sklearn.linear_model import LogisticRegression

    mean, scale = divergence.moments(source.features[fit])
    model = LogisticRegression(C=0.1, max_iter=300, tol=1e-3)
    model.fit((source.features[fit] - mean) / scale, source.y[fit])
    out = []
    for x in (source.features[held], target.features):
        score = model.decision_function((x - mean) / scale)
        score = np.stack((np.zeros(len(x)), score), axis=1) if score.ndim == 1 else score
        logits = np.full((len(x), c), score.min() - 30.0)  # a class without a row to learn from is never predicted
        logits[:, classes] = score
        out.append(logits)
    return fit, held, (out[0], out[1])


def _classifier(
    y: np.ndarray, logits: tuple[np.ndarray, np.ndarray], c: int
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    probs = calibration.softmax(logits[0]), calibration.softmax(logits[1])
    scale = calibration.temperature(logits[0], y)
    even = calibration.softmax(logits[0] / scale), calibration.softmax(logits[1] / scale)
    return {
        "accuracy": float((probs[0].argmax(1) == y).mean()), "chance": 1 / c,
        "confidence": float(probs[0].max(1).mean()), "ece": calibration.ece(probs[0], y), "temperature": scale,
        "ece_calibrated": calibration.ece(even[0], y),
        "target": {
            "confidence": float(probs[1].max(1).mean()), "confidence_calibrated": float(even[1].max(1).mean()),
            "accuracy_atc": calibration.atc(even[0], y, even[1]), "accuracy_doc": calibration.doc(even[0], y, even[1]),
            "predicted": np.bincount(probs[1].argmax(1), minlength=c).tolist(),
        },
    }, probs  # fmt: skip


def _shift(
    source: Sample, target: Sample, probs: tuple[np.ndarray, np.ndarray], permutations: int, seed: int
) -> dict[str, Any]:
    out = _tests(source.features, target.features, permutations, seed)
    out["outputs"] = divergence.output_shift(*probs)
    if len(source.names) > 1:
        out["sources"] = {
            name: asdict(divergence.domain_classifier(source.features[source.domain == i], target.features, seed=seed))
            for i, name in enumerate(source.names)
        }
    return out


def _tests(source: np.ndarray, target: np.ndarray, permutations: int, seed: int) -> dict[str, Any]:
    return {
        "linear": asdict(divergence.domain_classifier(source, target, "linear", seed=seed)),
        "trees": asdict(divergence.domain_classifier(source, target, "trees", seed=seed)),
        "mmd": asdict(divergence.mmd(source, target, permutations=permutations, seed=seed)),
    }


def _prior(
    source: Sample, held: np.ndarray, probs: tuple[np.ndarray, np.ndarray], logits: tuple[np.ndarray, np.ndarray],
    names: list[str], draws: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    y, c = source.y[held], len(names)
    out: dict[str, Any] = {"classes": names, "source": priors.class_prior(source.y, c).tolist(), "known": False}
    counts = np.bincount(y, minlength=c)
    if counts.min() == 0:
        missing = names[int(counts.argmin())]
        out["why"] = f"class {missing!r} has no held-out source row among the {len(held)} drawn"
        return out
    scale, bias = calibration.bcts(logits[0], y)
    even = calibration.softmax(logits[1] / scale + bias)
    if c > 100:  # least squares by draw and class is what takes the time
        draws = min(draws, 50)
    intervals = priors.bootstrap_priors(
        probs[0], y, probs[1], out["source"], calibrated=even, draws=draws, seed=seed
    )
    for name, interval in intervals.items():
        out[name] = {
            "estimate": interval.estimate.tolist(), "low": interval.low.tolist(), "high": interval.high.tolist(),
            "total_variation": priors.total_variation(interval.estimate, out["source"]),
            "classes_apart": list(priors.apart(interval, out["source"])),
        }  # fmt: skip
    out["disagreement"] = priors.total_variation(out["bbse"]["estimate"], out["mlls"]["estimate"])
    out["known"] = True
    return out


def _matched(
    source: Sample, target: Sample, prior: dict[str, Any], permutations: int, seed: int
) -> dict[str, Any]:
    rows = divergence.match_prior(source.y, prior["mlls"]["estimate"], seed)
    if len(rows) < 20:
        return {"known": False, "source_rows": len(rows)}
    tests = _tests(source.features[rows], target.features, permutations, seed)
    return {"known": True, "source_rows": len(rows), **tests}


def _duplicates(data: DataModule, source: Sample, target: Sample, near: float) -> dict[str, Any]:
    task, s, t, y = data.task, source.exact, target.exact, source.y
    pools = [features.whole_pool(p) for p in task.sources]
    hashes = [features.all_hashes(data, p, pool) for p, pool in zip(task.sources, pools, strict=True)]
    in_target = features.all_hashes(data, task.target, task.target.train)
    if in_target is not None and None not in hashes:
        s, t, y = [h for found in hashes for h in found], in_target, np.concatenate([p.labels.numpy() for p in pools])
    out: dict[str, Any] = {
        "source_rows": len(s), "target_rows": len(t),
        "whole": len(s) == sum(map(len, pools)) and len(t) == len(task.target.train),
        "exact": duplicates.exact_duplicates(s, t, y), "near_source_rows": len(source), "near_target_rows": len(target),
        "cosine": {"above": near, **duplicates.near_by_cosine(source.features, target.features, near)},
    }  # fmt: skip
    if source.perceptual is not None and target.perceptual is not None:
        out["perceptual"] = {"bits": 2, **duplicates.near_by_hash(source.perceptual, target.perceptual, 2)}
    return out
