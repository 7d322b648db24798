"""Source and target features in one plane."""

from __future__ import annotations

import numpy as np

from uda.report import figures, measures
from uda.report.collect import Outcome, Run
from uda.report.html import Section, by_labels, note, paragraph
from uda.report.sections.base import NO_MODEL, Report, held_out
from uda.report.style import Plot

WAYS = {"tsne": "t-SNE", "umap": "UMAP", "pca": "first two principal components"}


def section(report: Report) -> Section:
    """Source and target features in one plane."""
    title = "Features of source and target"
    if report.embedding == "none":
        return Section("embedding", title, note("Left out, as asked for (--embedding none)."))
    if all(r.target is None for r in report.runs):
        return Section("embedding", title, note(NO_MODEL))
    html = paragraph(
        f"{WAYS[report.embedding]} of the features that the classifier sees, both domains in one plane, at most "
        f"{report.max_samples:,} images of each (drawn with seed {report.seed})."
        + (
            " Distances between clusters and their sizes mean little in such a plane; what counts is whether a class "
            "of the target lies on the same class of the source."
            if report.embedding != "pca"
            else ""
        )
    )
    return Section("embedding", title, html + report.each(lambda i, r: embedding_of(report, i, r)))


def sample(run: Run, limit: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features, whether of the target, predicted and true class, and whether right, of a part of both domains."""
    parts: list[tuple[Outcome, np.ndarray]] = []
    for domains in (run.sources, [run.target]):
        for o in domains:
            parts.append((o, measures.subsample(len(o.y), -(-limit // len(domains)) if limit > 0 else 0, seed)))
    take = lambda name: np.concatenate([getattr(o, name)[rows] for o, rows in parts])  # noqa: E731
    is_target = np.concatenate([np.full(len(rows), o.is_target) for o, rows in parts])
    return take("features"), is_target, take("label"), take("y"), take("correct")


def embedding_of(report: Report, i: int, run: Run) -> str:
    """Up to three views of one plane."""
    if run.target is None:
        return note(NO_MODEL)
    features, is_target, label, y, correct = sample(run, report.max_samples, report.seed)
    if len(features) < 5:
        return note("There are too few images for a plane.")
    xy = measures.embed(features, report.embedding, report.seed)
    names, labelled = run.names_with_unknown, run.target.labelled
    n, m = int((~is_target).sum()), int(is_target.sum())
    both = bool(run.sources)
    domains = (", ".join(o.name for o in run.sources) or "none", run.target.name)
    where = f"{WAYS[report.embedding]} plane of {n} source and {m} target images"
    caption = f"{n:,} source images{', held out from training' if both and held_out(run) else ''}, {m:,} target images."
    if both:
        mixed = measures.mixing(features, is_target)
        caption += (
            f" Mixing of the domains among 10 nearest neighbours in feature space: {mixed:.2f} (0: apart, 1: as one "
            "domain)."
        )
    out = [report.figure(Plot(
        report.slug("embedding-domains", i), "By domain", f"{where}, coloured by domain.",
        lambda t: figures.embedding_domains(t, xy, is_target, domains), caption,
    ))]  # fmt: skip
    shown = np.where(is_target & (y < 0), label, y)
    by = "the source by its label, the target by its prediction"
    if labelled:
        by = f"true class, the target's for display only {by_labels()}"
    out.append(report.figure(Plot(
        report.slug("embedding-classes", i), "By class", f"{where}, coloured by class.",
        lambda t: figures.embedding_classes(t, xy, is_target, shown, names),
        f"Discs: source, crosses: target. Colour: {by}.",
    )))  # fmt: skip
    if labelled:
        wrong = int((is_target & ~correct & (y >= 0)).sum())
        out.append(report.figure(Plot(
            report.slug("embedding-errors", i), "Right and wrong", f"{where}; {wrong} target images are wrong.",
            lambda t: figures.embedding_errors(t, xy, is_target, correct),
            f"{wrong:,} of {m:,} target images shown are wrong {by_labels()}.",
        )))  # fmt: skip
    else:
        out.append(note("The target has no labels: a view of right and wrong predictions is left out."))
    return report.grid(out, "small")
