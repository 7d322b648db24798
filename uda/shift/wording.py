"""The figures in sentences: every statement carries the number that it rests on."""

from __future__ import annotations

from typing import Any

import numpy as np

Statement = dict[str, str]


def facts(found: dict[str, Any]) -> list[Statement]:
    """What was measured."""
    return [
        *_data(found["data"]), *_features(found["features"]), *_classifier(found["classifier"]),
        *_shift(found["shift"], found["features"]["centred_by_domain"]), *_prior(found["prior"], found.get("matched")),
        *_novelty(found["novelty"]), *_duplicates(found["duplicates"]),
    ]  # fmt: skip


def _fact(about: str, text: str, level: str = "fact") -> Statement:
    return {"about": about, "level": level, "text": text}


def _data(data: dict[str, Any]) -> list[Statement]:
    out = []
    for name, one in data["sources"].items():
        counts = [n for n in one["classes"].values() if n]
        absent = len(one["classes"]) - len(counts)
        lacks = f", {absent} of the task's classes absent" if absent else ""
        out.append(_fact("source", (
            f"{name}: {one['size']} rows ({one['drawn']} drawn) in {len(counts)} classes of {min(counts)} to "
            f"{max(counts)} rows{lacks}.")))  # fmt: skip
    target = data["target"]
    text = f"{target['name']}: {target['size']} rows ({target['drawn']} drawn); its labels are not read."
    return [*out, _fact("target", text)]


def _features(f: dict[str, Any]) -> list[Statement]:
    one_sided = f["constant_in_source_only"] + f["constant_in_target_only"]
    text = (
        f"{f['dimension']} features: {f['text']}. Rows with a NaN or an infinite value (left out): {f['bad_source']} "
        f"source, {f['bad_target']} target. Features that never vary: {f['constant_in_both']} in both domains, "
        f"{one_sided} in one only. Mean length {f['mean_norm_source']:.3g} and {f['mean_norm_target']:.3g}."
    )
    out = [_fact("features", text)]
    if f["origin"] == "random":
        out.append(_fact("features", (
            f"The {f['dimension']} features come from random weights: give a pretrained backbone or a checkpoint "
            "before trusting the figures below."), "warning"))  # fmt: skip
    if f["centred_by_domain"]:
        out.append(_fact("features", (
            f"All {f['dimension']} features have mean 0 in each domain (standardised by domain): the linear domain "
            "classifier and MMD see no mean that moved; trust the trees and the classifier's outputs.")))  # fmt: skip
    return out


def _classifier(c: dict[str, Any]) -> list[Statement]:
    t = c["target"]
    where = "held-out source rows" if c["separate"] else "source rows that it was TRAINED on (set source_val_fraction)"
    first = (
        f"{c['origin']}: accuracy {c['accuracy']:.1%} on {c['held_out_rows']} {where} (chance {c['chance']:.1%}), mean "
        f"confidence {c['confidence']:.1%}, calibration error (ECE) {c['ece']:.1%}, temperature {c['temperature']:.2f} "
        f"(ECE {c['ece_calibrated']:.1%} with it)."
    )
    second = (
        f"Mean confidence on the target {t['confidence']:.1%} ({t['confidence_calibrated']:.1%} with the temperature). "
        f"Accuracy there, estimated without labels: {t['accuracy_atc']:.1%} (ATC), {t['accuracy_doc']:.1%} (DoC); both "
        "are mostly too high under a large shift."
    )
    return [_fact("source classifier", first), _fact("on the target", second)]


def _p(value: float) -> str:
    return f"p {value:.2g}" if value >= 1e-4 else "p < 0.0001"


def _one(t: dict[str, Any]) -> str:
    return f"{t['pad']:.2f} [{t['pad_low']:.2f}, {t['pad_high']:.2f}] (error {t['error']:.1%}, {_p(t['p_value'])})"


def _shift(s: dict[str, Any], centred: bool) -> list[Statement]:
    low = s["linear"]["pad_high"] < 0
    why = " Below 0 beyond its interval: the sign of features centred by domain." if low and centred else ""
    out = [
        _fact("domain classifier", (
            f"Proxy A-distance {_one(s['linear'])} by a linear classifier, {_one(s['trees'])} by trees; 0: the same, "
            f"2: told apart always.{why}")),
        _fact("MMD", (
            f"MMD^2 {s['mmd']['mmd2']:.4g}, {_p(s['mmd']['p_value'])} ({s['mmd']['permutations']} permutations of "
            f"{s['mmd']['source_rows']} and {s['mmd']['target_rows']} rows).")),
        _fact("outputs", (
            f"Largest gap between the classifier's probabilities on source and target: {s['outputs']['statistic']:.2f} "
            f"(Kolmogorov-Smirnov, {_p(s['outputs']['p_value'])} over all classes).")),
    ]  # fmt: skip
    for name, one in s.get("sources", {}).items():
        out.append(_fact("domain classifier", f"{name} alone: proxy A-distance {_one(one)}."))
    return out


def _prior(prior: dict[str, Any], matched: dict[str, Any] | None) -> list[Statement]:
    if not prior["known"]:
        return [_fact("target prior", f"Not estimated: {prior['why']}.")]
    names, base = prior["classes"], np.array(prior["source"])
    estimate = np.array(prior["mlls"]["estimate"])
    most = np.argsort(-np.abs(estimate - base))[:3]
    moved = "; ".join(
        f"{names[i]} {base[i]:.1%} -> {estimate[i]:.1%} "
        f"[{prior['mlls']['low'][i]:.1%}, {prior['mlls']['high'][i]:.1%}]" for i in most
    )  # fmt: skip
    out = [_fact("target prior", (
        f"Distance from the source's class shares (total variation): {prior['bbse']['total_variation']:.2f} by BBSE, "
        f"{prior['mlls']['total_variation']:.2f} by MLLS; the two differ by {prior['disagreement']:.2f}. Largest "
        f"changes by MLLS: {moved}. Valid as far as the inputs of each class did not change."))]  # fmt: skip
    if matched is not None and matched["known"]:
        smallest = min(matched[k]["p_value"] for k in ("linear", "trees", "mmd"))
        out.append(_fact("after matching", (
            f"With {matched['source_rows']} source rows drawn to these shares: proxy A-distance "
            f"{_one(matched['linear'])} linear, {_one(matched['trees'])} trees, MMD^2 {matched['mmd']['mmd2']:.4g} "
            f"({_p(matched['mmd']['p_value'])}); smallest {_p(smallest)}.")))  # fmt: skip
    elif matched is not None:
        out.append(_fact("after matching", f"Only {matched['source_rows']} source rows fit these shares: not tested."))
    return out


def _novelty(n: dict[str, Any]) -> list[Statement]:
    low = list(n["ranks"].values())
    return [_fact("far rows", (
        f"{n['far']:.1%} of the target lies further from the source than 95% of held-out source rows do (less the 5% "
        f"expected); {low[0]:.1%} and {low[1]:.1%} lie in its nearest two quarters (25% each if alike)."))]  # fmt: skip


def _duplicates(d: dict[str, Any]) -> list[Statement]:
    exact, cosine = d["exact"], d["cosine"]
    of = "" if d["whole"] else " (drawn rows only: there may be more)"
    text = (
        f"Exact duplicates among {d['source_rows']} source and {d['target_rows']} target rows{of}: {exact['source']} "
        f"in the source ({exact['conflicts']} inputs with two labels), {exact['target']} in the target, "
        f"{exact['across']} target rows that the source has. Near ones among {d['near_source_rows']} and "
        f"{d['near_target_rows']} rows (cosine of centred features above {cosine['above']:g}): {cosine['source']}, "
        f"{cosine['target']}, {cosine['across']}."
    )
    if p := d.get("perceptual"):
        text += f" By perceptual hash (at most {p['bits']} of 64 bits): {p['source']}, {p['target']}, {p['across']}."
    leak = exact["across"] > 0 or exact["conflicts"] > 0
    return [_fact("duplicates", text, "warning" if leak else "fact")]


def advice(found: dict[str, Any], verdict: dict[str, Any], methods: list[str], goal: str) -> list[Statement]:
    """What it looks like, and what to try."""
    shift, kind = found["shift"], verdict["setting"]
    tests = {k: v["p_value"] for k, v in shift.items() if isinstance(v, dict) and "p_value" in v}
    name, smallest = min(tests.items(), key=lambda item: item[1])
    text = f"{verdict['text']}: {_because(found, kind, name, smallest)}"
    out = [_fact("looks like", text, "advice")]
    if verdict["absent_classes"]:
        absent, prior = verdict["absent_classes"], found["prior"]
        total = sum(share for n, share in zip(prior["classes"], prior["source"], strict=True) if n in absent)
        shown = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
        out.append(_fact("class sets", (
            f"The target seems to lack {len(absent)} source classes ({shown}; {total:.1%} of the source): partial "
            "adaptation."), "advice"))  # fmt: skip
    if verdict["private_suspected"]:
        n = found["novelty"]
        out.append(_fact("class sets", (
            f"About {n['far']:.1%} of the target is like no source row while the rest lies as the source does: the "
            "target may have classes of its own (open-set or universal adaptation), or images of another kind."),
            "advice"))  # fmt: skip
    if kind == "label":
        distance = found["prior"]["mlls"]["total_variation"]
        out.append(_fact("first", (
            f"Correct the source classifier's prior (distance {distance:.2f}): multiply its probabilities by estimated "
            "over source shares and scale to sum one. That needs no training."), "advice"))  # fmt: skip
    if methods:
        why = {
            "covariate": f"proxy A-distance {max(shift['linear']['pad'], shift['trees']['pad']):.2f}",
            "open": f"{found['novelty']['far']:.1%} of the target far from the source",
            "partial": f"{len(verdict['absent_classes'])} classes seem absent",
        }.get(goal) or f"prior distance {found['prior']['mlls']['total_variation']:.2f}"  # fmt: skip
        out.append(_fact("try first", f"{', '.join(methods)} (installed; {why}).", "advice"))
    elif kind != "none":
        out.append(_fact("try first", "0 of the methods for this setting are installed: see `uda plugins`.", "advice"))
    return out


def _because(found: dict[str, Any], kind: str, name: str, smallest: float) -> str:
    from uda.shift.advice import against_label_shift, label_shift_alone

    tests = {"linear": "linear domain classifier", "trees": "trees", "mmd": "MMD", "outputs": "classifier outputs"}
    if kind == "none":
        return f"none of the tests finds one (smallest {_p(smallest)}, {tests[name]})."
    text = f"the domains differ ({tests[name]}, {_p(smallest)})"
    if not found["prior"]["known"]:
        return f"{text}; whether classes have other shares is not known."
    distance, alone = found["prior"]["mlls"]["total_variation"], label_shift_alone(found)
    if kind == "label":
        return f"{text}, and no longer once classes have the estimated shares (distance {distance:.2f})."
    if found["matched"]["known"]:
        smallest = min(found["matched"][k]["p_value"] for k in ("linear", "trees", "mmd"))
        text += f", {'not' if alone else 'and still'} with matched class shares ({_p(smallest)})"
    if kind == "both":
        return f"{text}; the estimated shares are {distance:.2f} away, too far for errors alone."
    return f"{text}; label shift is not named: {against_label_shift(found, alone)}."
