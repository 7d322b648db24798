"""What the figures of a look at a shift mean: which kind of shift, whether to adapt, and by which methods.

Rules of thumb, each with its threshold here and its figure in the statement that it makes. None of them is a proof:
without target labels a shift of the classes and one of the inputs cannot be told apart in general.
"""

from __future__ import annotations

from typing import Any

from uda.shift.methods import installed, try_first

#: A shift counts as found where the smallest p-value, times the number of tests, is below this.
ALPHA = 0.01
#: Distance of class priors (total variation) from which label shift is worth naming where nothing else moved.
LABEL_SHIFT = 0.05
#: The same where inputs moved too: an error of the classifier moves the estimates about as far as accuracy fell.
LABEL_SHIFT_BESIDE, PER_LOST_ACCURACY = 0.2, 1.5
#: Estimates that differ by more than this, and by more than half of their distance, are not believed.
AGREEMENT = 0.1
#: Nor are they where a domain classifier reaches this proxy A-distance: without common ground all is extrapolated.
NO_OVERLAP = 1.8
#: Source rows with the estimated class shares below which a test that finds nothing says nothing.
ENOUGH_ROWS = 100
#: Distance of class priors from which alignment of the marginals is warned of.
FAR_PRIOR = 0.1
#: Estimated accuracy within this of chance: pseudo-labels are noise.
CHANCE_MARGIN = 0.1
#: Estimated loss of accuracy below which there is little to gain.
LITTLE = 0.02
#: A class counts as absent where its estimate and its interval's end are below this part of its source share.
ABSENT = 0.25
#: Target-private classes are suspected from this share of rows that are far from the source, ...
FAR_ROWS = 0.1
#: ... where the others lie as the source does, ...
FLAT = 0.7
#: ... and a linear domain classifier errs at least this often, so that not all of the target moved.
STILL_MIXED = 0.15

NAMES = {
    "none": "no shift", "covariate": "covariate shift", "label": "label shift", "both": "covariate and label shift",
}  # fmt: skip


def p_values(tests: dict[str, Any]) -> dict[str, float]:
    """p-value of each test in a section of figures."""
    return {k: v["p_value"] for k, v in tests.items() if isinstance(v, dict) and "p_value" in v}


def shifted(tests: dict[str, Any]) -> bool:
    """Whether any test finds a shift, corrected for their number (Bonferroni)."""
    found = p_values(tests)
    return min(found.values()) * len(found) < ALPHA


def accuracy_estimate(classifier: dict[str, Any]) -> float:
    """The lower one of the two label-free estimates of target accuracy: both err upwards."""
    return min(classifier["target"]["accuracy_atc"], classifier["target"]["accuracy_doc"])


def prior_distance(found: dict[str, Any]) -> float | None:
    """The smaller distance of the two estimated priors from the source's; None where there is no estimate."""
    prior = found["prior"]
    return min(prior[k]["total_variation"] for k in ("bbse", "mlls")) if prior["known"] else None


def label_shift_needed(found: dict[str, Any]) -> float:
    """Distance of priors above which label shift is named beside another one."""
    lost = max(0.0, found["classifier"]["accuracy"] - accuracy_estimate(found["classifier"]))
    return LABEL_SHIFT_BESIDE + PER_LOST_ACCURACY * lost


def overlap(found: dict[str, Any]) -> float:
    """The larger proxy A-distance of the two domain classifiers, with matched class shares where there are such."""
    matched = found.get("matched", {"known": False})
    tests = matched if matched["known"] else found["shift"]
    return max(tests["linear"]["pad"], tests["trees"]["pad"])


def against_label_shift(found: dict[str, Any], alone: bool = False) -> str | None:
    """Why label shift is not named, with its figure; None where nothing speaks against it.

    Args:
        alone: whether it would explain everything (the tests find nothing with matched class shares).
    """
    prior, distance = found["prior"], prior_distance(found)
    if distance is None:
        return prior["why"]
    rows = found.get("matched", {"source_rows": 0})["source_rows"]
    least = LABEL_SHIFT if alone else label_shift_needed(found)
    if distance < least:
        return f"the estimated class shares are {distance:.2f} away, and errors alone may explain up to {least:.2f}"
    if prior["disagreement"] > max(AGREEMENT, distance / 2):
        return f"the two estimates of the class shares differ by {prior['disagreement']:.2f}"
    if alone and rows < ENOUGH_ROWS:
        return f"only {rows} source rows fit the estimated class shares, too few to test"
    if not alone and overlap(found) >= NO_OVERLAP:
        return f"the domains hardly overlap (proxy A-distance {overlap(found):.2f}), so that any estimate is a guess"
    if not all(prior[k]["classes_apart"] for k in (["mlls"] if alone else ["mlls", "bbse"])):
        return f"at a distance of {distance:.2f} no class leaves its interval"
    return None


def kind_of_shift(found: dict[str, Any]) -> str:
    """``none``, ``covariate``, ``label`` or ``both``."""
    if not shifted(found["shift"]):
        return "none"
    alone = label_shift_alone(found)
    if against_label_shift(found, alone) is not None:
        return "covariate"
    return "label" if alone else "both"


def label_shift_alone(found: dict[str, Any]) -> bool:
    """Whether the tests find nothing once the source's classes have the estimated shares."""
    matched = found.get("matched", {"known": False})
    return matched["known"] and not shifted(matched)


def absent_classes(found: dict[str, Any], kind: str) -> list[str]:
    """Source classes that the target seems to lack, where the priors can be believed."""
    prior = found["prior"]
    if kind not in ("label", "both") or not prior["known"]:
        return []
    rows = zip(
        prior["classes"], prior["source"], prior["mlls"]["high"], prior["bbse"]["estimate"], strict=True
    )
    return [name for name, share, high, other in rows if max(high, other) < ABSENT * share]


def private_suspected(found: dict[str, Any], kind: str) -> bool:
    """Whether a part of the target looks like nothing in the source while the rest looks like the source."""
    if kind in ("none", "label"):
        return False
    matched = found.get("matched", {"known": False})
    error = (matched if matched["known"] else found["shift"])["linear"]["error"]
    novelty = found["novelty"]
    centred = found["features"]["centred_by_domain"]  # then the linear error says nothing
    return novelty["far"] >= FAR_ROWS and novelty["flat"] >= FLAT and error >= STILL_MIXED and not centred


def advise(found: dict[str, Any]) -> dict[str, Any]:
    """Verdict, statements and methods from the other figures.

    Returns:
        ``verdict``: ``setting`` (``none``, ``covariate``, ``label``, ``both``), ``text``, ``adapt`` (``yes``,
        ``caution`` or ``no``), ``absent_classes``, ``private_suspected``; ``statements``: list of ``about``, ``level``
        (``fact``, ``advice`` or ``warning``) and ``text``; ``methods``: names of installed plugins to try first.
    """
    from uda.shift import wording

    kind = kind_of_shift(found)
    absent, private = absent_classes(found, kind), private_suspected(found, kind)
    several = len(found["data"]["sources"]) > 1
    goal = "open" if private else "partial" if absent else kind
    methods = try_first(goal, installed(), several)
    text = NAMES[kind] + ("; different class sets suspected" if absent or private else "")
    warnings = reasons_not_to_adapt(found, kind)
    adapt = "no" if any(w["stop"] for w in warnings) else "caution" if warnings else "yes"
    verdict = {
        "setting": kind, "text": text, "adapt": adapt, "absent_classes": absent, "private_suspected": private,
    }  # fmt: skip
    facts = wording.facts(found)
    advice = wording.advice(found, verdict, methods, goal)
    abouts = ["do not adapt" if w["stop"] else "caution" for w in warnings]
    told = [{"about": a, "level": "warning", "text": w["text"]} for a, w in zip(abouts, warnings, strict=True)]
    return {"verdict": verdict, "statements": [*facts, *advice, *told], "methods": methods}


def reasons_not_to_adapt(found: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Where negative transfer is likely: ``stop`` (do not adapt) and ``text`` with its figures."""
    classifier, out = found["classifier"], []
    accuracy, estimate, chance = classifier["accuracy"], accuracy_estimate(classifier), classifier["chance"]
    tests = p_values(found["shift"])
    if kind == "none":
        out.append({"stop": True, "text": (
            f"No shift was found (smallest p-value {min(tests.values()):.2g} of {len(tests)} tests; domain classifier "
            f"error {found['shift']['linear']['error']:.1%}, chance 50%): adaptation can only add noise. Train on the "
            "source and use it.")})  # fmt: skip
    if accuracy <= chance + CHANCE_MARGIN:
        out.append({"stop": True, "text": (
            f"The source classifier reaches {accuracy:.1%} on held-out source rows, with chance at {chance:.1%}: no "
            "method can carry over what was not learned. Choose better features first.")})  # fmt: skip
    elif kind != "none" and estimate <= chance + CHANCE_MARGIN:
        out.append({"stop": True, "text": (
            f"The source classifier is near chance on the target: {estimate:.1%} estimated without labels, chance "
            f"{chance:.1%}. Pseudo-labels would be noise, and aligned domains may well swap classes. Find closer "
            "features or a nearer source, or label some target rows.")})  # fmt: skip
    distance = prior_distance(found)
    if kind in ("label", "both") and distance is not None and distance >= FAR_PRIOR:
        out.append({"stop": False, "text": (
            f"The target's classes have other shares (total variation {distance:.2f}): methods that make the marginal "
            "distributions equal (DANN, MMD, CORAL) put at least that share of the target on wrong classes. "
            "Correct the prior first, or use a method that weighs classes.")})  # fmt: skip
    elif kind == "covariate" and distance is not None and distance >= LABEL_SHIFT_BESIDE:
        out.append({"stop": False, "text": (
            f"The estimated class shares are {distance:.2f} (total variation) from the source's, and not believed: "
            f"{against_label_shift(found, label_shift_alone(found))}. If the target's classes may have other shares, "
            "do not align the marginal distributions alone.")})  # fmt: skip
    if kind != "none" and estimate >= accuracy - LITTLE:
        out.append({"stop": False, "text": (
            f"Little to gain: accuracy on the target is estimated at {estimate:.1%}, on held-out source rows it is "
            f"{accuracy:.1%}. The estimate is often too high, but source-only is the figure to beat.")})  # fmt: skip
    return out
