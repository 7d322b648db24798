"""The parts of a report, each from the runs alone."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import yaml

from uda.errors import UDAError
from uda.report import figures, measures
from uda.report.collect import TARGET_ACCURACY, Outcome, Run
from uda.report.figures import Line, run_color
from uda.report.html import Cell, Section, bullets, by_labels, details, dot, note, oracle, paragraph, table, text
from uda.report.style import PRINT, SOURCE, TARGET, Plot, data_uri, inline_svg
from uda.run.summary import percent

RULES = {"last": "last epoch", "selected": "selected without labels", "oracle": "best epoch by target labels"}


@dataclass
class Report:
    """What is reported, and the figures so far.

    Attributes:
        runs: in the order given; the first one is what others are compared with.
        embedding: ``tsne``, ``umap``, ``pca`` or ``none``; ``max_samples``: of each domain in it; ``seed``: of both.
        mistakes: how many pictures of mistakes.
        plots: filled by :meth:`figure`.
    """

    runs: list[Run]
    embedding: str = "tsne"
    max_samples: int = 1000
    seed: int = 0
    mistakes: int = 24
    plots: list[Plot] = field(default_factory=list)

    @property
    def several(self) -> bool:
        """Whether runs are compared."""
        return len(self.runs) > 1

    def figure(self, plot: Plot) -> str:
        """A figure as HTML, and kept so that it can be written as a file; names are made safe and unlike others."""
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", plot.name).strip("-")
        taken = {p.name for p in self.plots}
        plot = replace(plot, name=name if name not in taken else f"{name}-{len(self.plots)}")
        self.plots.append(plot)
        title = f'<div class="t">{plot.title}</div>' if plot.title else ""
        caption = f"<figcaption>{plot.caption}</figcaption>" if plot.caption else ""
        return f"<figure>{title}{inline_svg(plot)}{caption}</figure>"

    def grid(self, items: Iterable[str], css: str = "") -> str:
        """Figures side by side where there is room."""
        return f'<div class="grid {css}">{"".join(items)}</div>'

    def each(self, part: Callable[[int, Run], str]) -> str:
        """A part for each run, under its name where there are several."""
        if not self.several:
            return part(0, self.runs[0])
        return "".join(f"<h3>{dot(run_color(i))}{text(r.name)}</h3>{part(i, r)}" for i, r in enumerate(self.runs))

    def title(self, i: int) -> str:
        """Title of a figure of one run: its name, where there are several."""
        return f"{dot(run_color(i))}{text(self.runs[i].name)}" if self.several else ""

    def slug(self, name: str, i: int) -> str:
        """File name of a figure of one run."""
        return f"{name}-{i + 1}" if self.several else name


def method(run: Run) -> str:
    """Plugins by class name, such as ``CDAN + MCC``."""
    names = [p["class_path"].rsplit(".", 1)[-1] for p in (run.summary.get("plugins") or {}).values()]
    return " + ".join(names) or "source only"


def all_sections(report: Report) -> list[Section]:
    """Every part, in order."""
    made = (glance, settings, learning, classes, embedding, calibration, class_shares, worst, provenance)
    return [part(report) for part in made]


# ---------------------------------------------------------------------------------------------- results


def glance(report: Report) -> Section:
    """Accuracy by the three rules, and what stands out."""
    html = cards(report.runs[0]) if not report.several else ""
    html += results_table(report)
    labelled = any(r.summary["target_accuracy"]["last"] is not None for r in report.runs)
    if labelled:
        html += paragraph(
            "Accuracies on the target are measured with its labels. <em>Last</em> and <em>selected</em> (the epoch "
            f"with the best label-free score) are chosen without them; {oracle()} is the best validation by target "
            f"labels, an upper bound that nobody without labels can have. {by_labels()} marks what is drawn with "
            "target labels, for display only."
        )
    else:
        html += note("The target has no labels: accuracies on it, and all that is made from them, are left out.")
    html += bullets(remarks(report))
    for run in report.runs:
        html += "".join(note(f"{run.name}: {n}" if report.several else n) for n in run.notes)
    return Section("results", "Results", html)


def cards(run: Run) -> str:
    """The large figures of one run."""
    s = run.summary
    chosen = s["selection"]
    at = "" if chosen["epoch"] is None else f", epoch {chosen['epoch']}"
    best = run.row_of("oracle")
    best_at = "" if best is None else f", epoch {best['epoch']}"
    shown = [
        ("source", percent(s["source_accuracy"]), "source, held out" if held_out(run) else "source", ""),
        ("last", percent(s["target_accuracy"]["last"]), "target, last epoch", ""),
        ("selected", percent(s["target_accuracy"]["selected"]), f"target, selected by {chosen['score']}{at}", ""),
        (
            "oracle", percent(s["target_accuracy"]["oracle"]),
            f"target, oracle{best_at}", "oracle",
        ),
    ]  # fmt: skip
    rows = "".join(
        f'<div class="card {css if value != "-" else ""}"><b>{value}</b><span>{text(words)}</span></div>'
        for _, value, words, css in shown
        if value != "-"
    )
    return f'<div class="cards">{rows}</div>'


def held_out(run: Run) -> bool:
    """Whether source accuracy is on images that were not trained on."""
    return float((run.config.get("data") or {}).get("source_val_fraction", 0.1)) > 0


def results_table(report: Report) -> str:
    """Runs over figures."""
    head = [
        [
            Cell("run", rows=2), Cell("method", rows=2), Cell("source", "n", rows=2),
            Cell("target", columns=3), Cell("target, class mean", columns=3),
            Cell("selected by", rows=2), Cell("time, s", "n", rows=2),
        ],
        [Cell("last", "n"), Cell("selected", "n"), Cell(oracle(), "n oracle")] * 2,
    ]  # fmt: skip
    body = []
    for i, run in enumerate(report.runs):
        s, chosen = run.summary, run.summary["selection"]
        values = [
            Cell(percent(s[kind][rule]), "n oracle" if rule == "oracle" else "n")
            for kind in ("target_accuracy", "target_class_accuracy")
            for rule in RULES
        ]
        by = f"{chosen['score']}, epoch {chosen['epoch']}"
        if chosen["epoch"] is None:
            by = f"{chosen['score']}: none"
        mark = dot(run_color(i)) if report.several else ""
        body.append([
            Cell(f"{mark}{text(run.name)}", head=True), Cell(text(method(run))),
            Cell(percent(s["source_accuracy"]), "n"), *values, Cell(text(by)), Cell(f"{s['seconds']:.0f}", "n"),
        ])  # fmt: skip
    return table("Accuracy in percent, as in each run's summary.json", head, body)


def remarks(report: Report) -> list[str]:
    """Sentences on what stands out, each from the numbers alone."""
    out = []
    for run in report.runs:
        found = remarks_on(run)
        if report.several and found:
            out.append(f"<strong>{text(run.name)}</strong>: {'; '.join(found)}.")
        else:
            out += [w[0].upper() + w[1:] + "." for w in found]
    out += [r for i in range(1, len(report.runs)) if (r := compared(report, i))]
    if report.several:
        words = "Each row is one run: a difference within the spread over seeds means nothing"
        out.append(f"{words} (<code>uda bench</code> runs several seeds).")
    return out


def remarks_on(run: Run) -> list[str]:
    """What stands out of one run."""
    out, s = [], run.summary["target_accuracy"]
    if s["selected"] is not None and s["oracle"] is not None:
        lost = 100 * (s["oracle"] - s["selected"])
        out.append(
            "the epoch that the label-free score takes is as good as the oracle's"
            if lost < 0.05
            else f"choosing the epoch without labels costs {lost:.1f} points against the oracle"
        )
    if collapsed := [r["epoch"] for r in run.history if r.get("select/collapsed") == 1]:
        out.append(f"predictions had collapsed in {len(collapsed)} of {len(run.history)} validations")
    if run.target is None or not run.target.labelled:
        return out
    names, matrix = run.names_with_unknown, matrix_of(run)
    accuracy = measures.class_accuracies(matrix)
    worst = int(np.nanargmin(accuracy))
    words = f"the weakest class is {text(names[worst])} ({100 * accuracy[worst]:.0f} %)"
    for t, p, n, _ in measures.confused_pairs(matrix, 1):
        words += f", the most frequent mistake {text(names[t])} taken for {text(names[p])} ({n} images)"
    out.append(words)
    if (error := ece(run.target)) is not None:
        source = next((x for o in run.sources if (x := ece(o)) is not None), None)
        ref = "" if source is None else f", on the source {100 * source:.1f}"
        out.append(f"calibration error (ECE) on the target is {100 * error:.1f} points{ref}")
    return out


def compared(report: Report, i: int) -> str | None:
    """What the i-th run gets right that the first does not, and the reverse, image by image."""
    a, b = report.runs[0].target, report.runs[i].target
    if a is None or b is None or not (a.labelled and b.labelled) or a.ids != b.ids or (a.y != b.y).any():
        return None
    fixed, broken = int((~a.correct & b.correct)[b.y >= 0].sum()), int((a.correct & ~b.correct)[b.y >= 0].sum())
    return (
        f"On the same {int((b.y >= 0).sum()):,} target images <strong>{text(report.runs[i].name)}</strong> gets "
        f"{fixed:,} right that <strong>{text(report.runs[0].name)}</strong> gets wrong, and {broken:,} wrong that it "
        "gets right."
    )


# --------------------------------------------------------------------------------------------- settings


def plain(value: Any) -> str:
    """A setting as text."""
    if value is ...:
        return '<span class="none">–</span>'
    shown = "null" if value is None else value if isinstance(value, str) else yaml.safe_dump(
        value, default_flow_style=True, width=10_000
    ).removesuffix("\n").removesuffix("\n...")  # fmt: skip
    return f"<code>{text(shown)}</code>"


def settings(report: Report) -> Section:
    """Differing settings of several runs, or the settings of one."""
    if report.several:
        rows = measures.differences([r.config for r in report.runs])
        head = [[Cell("setting"), *(Cell(f"{dot(run_color(i))}{text(r.name)}") for i, r in enumerate(report.runs))]]
        body = [[Cell(f"<code>{text(k)}</code>", head=True), *(Cell(plain(v)) for v in vs)] for k, vs in rows.items()]
        html = (
            table(f"{len(rows)} settings differ; a dash: the run has no such setting", head, body)
            if rows
            else note("All settings are the same.")
        )
    else:
        run = report.runs[0]
        plugins = (run.config.get("model") or {}).get("plugins") or {}
        body = []
        for key, plugin in plugins.items():
            plugin = plugin if isinstance(plugin, dict) else {"class_path": plugin}
            name = str(plugin.get("class_path")).rsplit(".", 1)[-1]
            told = ", ".join(f"{text(k)} = {plain(v)}" for k, v in (plugin.get("init_args") or {}).items())
            body.append([Cell(text(key), head=True), Cell(f"<code>{text(name)}</code>"), Cell(told)])
        head = [[Cell("key"), Cell("plugin"), Cell("arguments")]]
        html = table("Methods of the run", head, body) if body else paragraph("No plugin: trained on the source alone.")
    for run in report.runs:
        name = f"Complete config of {run.name}" if report.several else "Complete config"
        html += details(name, f"<pre>{text(yaml.safe_dump(run.config, sort_keys=False))}</pre>")
    return Section("settings", "Settings that differ" if report.several else "Settings", html)


# ------------------------------------------------------------------------------------------------ curves


def learning(report: Report) -> Section:
    """Accuracies, objectives and label-free scores over the steps."""
    html = paragraph("Over the steps of the optimiser. Accuracies and scores are taken in each validation.")
    if not any(r.history for r in report.runs):
        return Section("curves", "Learning curves", note("The runs kept no history: there is nothing to draw."))
    html += accuracy_figure(report)
    html += "<h3>Objectives</h3>" + objectives(report) + "<h3>Label-free scores</h3>" + scores(report)
    return Section("curves", "Learning curves", html)


def accuracy_figure(report: Report) -> str:
    """Target and source accuracy over the steps, with the epochs that the rules take."""
    lines = []
    for i, run in enumerate(report.runs):
        x, y = run.series(TARGET_ACCURACY)
        if len(x):
            marks = tuple(
                (row["step"], row[TARGET_ACCURACY], mark)
                for rule, mark in (("last", "o"), ("selected", "D"), ("oracle", "*"))
                if (row := run.row_of(rule)) is not None and math.isfinite(row.get(TARGET_ACCURACY, math.nan))
            )
            name = f"{run.name}, target" if report.several else "target"
            lines.append(Line(name, x, y, run_color(i) if report.several else TARGET, False, marks))
        x, y = run.series("source_accuracy")
        if len(x):
            name = f"{run.name}, source" if report.several else "source"
            lines.append(Line(name, x, y, run_color(i) if report.several else SOURCE, True))
    if not lines:
        return note("No accuracy was measured: the run has neither a source nor target labels.")
    target = any(not line.dashed for line in lines)
    caption = "Dashed: source. " + (
        f"Solid: target {by_labels()}. ● last epoch, ◆ selected without labels, ★ {oracle()}."
        if target
        else "There is no curve of the target, which has no labels."
    )
    end = "; ".join(f"{ln.label} ends at {100 * ln.y[-1]:.1f} %" for ln in lines)
    plot = Plot(
        "accuracy", "Accuracy", f"Accuracy in percent over training steps: {end}.",
        lambda t: figures.curves(t, lines, "accuracy, %", percent=True, size=(10.4, 4.0)), caption,
    )  # fmt: skip
    return report.figure(plot) + history_table(report)


def history_table(report: Report) -> str:
    """The numbers behind the curves."""
    out = ""
    for run in report.runs:
        keys = ["source_accuracy", TARGET_ACCURACY, f"select/{run.summary['selection']['score']}"]
        keys = [k for k in keys if any(k in r for r in run.history)]
        head = [[Cell("epoch"), Cell("step", "n"), *(Cell(text(k), "n") for k in keys)]]
        body = [
            [
                Cell(str(r["epoch"]), head=True), Cell(str(r["step"]), "n"),
                *(Cell(f"{r.get(k, math.nan):.4f}", "n") for k in keys),
            ]
            for r in run.history
        ]  # fmt: skip
        name = f"Values of {run.name}" if report.several else "Values"
        out += details(name, table(text("One row a validation"), head, body))
    return out


def objectives(report: Report) -> str:
    """A small figure for each objective and diagnostic."""
    names = list(dict.fromkeys(n for r in report.runs for n in r.objectives))
    if not names:
        return note("No objective was logged: see trainer.log_every_n_steps.")
    names = sorted(names, key=lambda n: (n == "loss", "/" in n, n))
    out = []
    for name in names:
        lines = [
            Line(run.name, *run.objectives[name], run_color(i))
            for i, run in enumerate(report.runs)
            if name in run.objectives
        ]
        title = "sum of the objectives" if name == "loss" else name
        out.append(report.figure(Plot(f"objective-{name}", text(title), trend(title, lines), small(lines))))
    words = "Objectives and diagnostics by plugin key, at the steps that were logged (trainer.log_every_n_steps)."
    if any(not (r.path / "logs" / "metrics.csv").is_file() for r in report.runs):
        words += " Where there is no metrics.csv, a point is the mean of the logged steps before a validation."
    return paragraph(text(words)) + colour_key(report) + report.grid(out, "small")


def colour_key(report: Report) -> str:
    """Which colour is which run."""
    names = (f"{dot(run_color(i))}{text(r.name)}" for i, r in enumerate(report.runs))
    return paragraph(" &nbsp; ".join(names)) if report.several else ""


def small(lines: list[Line]) -> Callable[[Any], Any]:
    """A small multiple, with lines bound now."""
    return lambda t: figures.curves(t, lines, size=(3.5, 2.2), legend=t is PRINT and len(lines) > 1)


def trend(name: str, lines: Sequence[Line]) -> str:
    """Alternative text of curves."""
    ends = "; ".join(f"{ln.label} from {ln.y[0]:.3g} to {ln.y[-1]:.3g}" for ln in lines if len(ln.y))
    return f"{name} over training steps: {ends}."


def scores(report: Report) -> str:
    """A small figure for each label-free score, with the target accuracy behind it."""
    names = dict.fromkeys(
        k for r in report.runs for row in r.history for k in row if k.startswith("select/") and k != "select/collapsed"
    )
    if not names:
        return note("No label-free score was computed.")
    out = []
    for key in names:
        name, lines, told = key.removeprefix("select/"), [], []
        for i, run in enumerate(report.runs):
            x, y = run.series(key)
            if not len(x):
                continue
            lines.append(Line(run.name, x, y, run_color(i), False, taken(run, name)))
            pairs = [(r.get(key, math.nan), r.get(TARGET_ACCURACY, math.nan)) for r in run.history]
            if (rho := measures.rank_correlation(*np.array(pairs, float).T)) is not None:
                told.append(f"{dot(run_color(i)) if report.several else ''}{rho:+.2f}")
        behind = report.runs[0].series(TARGET_ACCURACY) if not report.several else None
        caption = f"Rank correlation with target accuracy {by_labels()}: {', '.join(told)}" if told else ""
        title = f"{name} (selects)" if name in {r.summary["selection"]["score"] for r in report.runs} else name
        draw = lambda t, ls=lines, b=behind: figures.score_curve(t, ls, "", b, t is PRINT and len(ls) > 1)  # noqa: E731
        out.append(report.figure(Plot(f"score-{name}", text(title), trend(f"score {name}", lines), draw, caption)))
    words = "Larger is better for all of them. ◆ is the epoch that the score would take alone."
    if not report.several and len(report.runs[0].series(TARGET_ACCURACY)[0]):
        words += " The thin dashed line and the right scale are the target accuracy in percent, for comparison only."
    return paragraph(words) + colour_key(report) + report.grid(out, "small")


def taken(run: Run, score: str) -> tuple[tuple[float, float, str], ...]:
    """The validation that a score would take, as a mark; none that had collapsed."""
    from uda.selection import select_epoch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at = select_epoch(run.history, score)
    return () if at is None else ((run.history[at]["step"], run.history[at][f"select/{score}"], "D"),)


# ----------------------------------------------------------------------------------------------- classes


NO_MODEL = "The model was not evaluated (see Results), so this part is left out."
NO_LABELS = "The target has no labels, so this part is left out."


def matrix_of(run: Run) -> np.ndarray:
    """Confusion matrix of the target."""
    return measures.confusion_matrix(run.target.label, run.target.y, len(run.names_with_unknown))


def lacking(run: Run) -> str | None:
    """Why a part that needs target labels is not there."""
    return NO_MODEL if run.target is None else None if run.target.labelled else NO_LABELS


def classes(report: Report) -> Section:
    """Confusion matrices and accuracy of each class."""
    title = "Classes"
    reasons = [lacking(r) for r in report.runs]
    if all(reasons):
        return Section("classes", title, note(reasons[0]))
    html = paragraph(f"On the target's evaluation images, with their labels {by_labels()}.")
    shown = [(i, r) for i, r in enumerate(report.runs) if not reasons[i]]
    html += "".join(note(f"{r.name}: {reasons[i]}") for i, r in enumerate(report.runs) if reasons[i])
    parts = [confusion_figure(report, i, r) for i, r in shown]
    if all(r.names_with_unknown == shown[0][1].names_with_unknown for _, r in shown):
        together = [i for i, _ in shown]
        bars = class_figure(report, together)
        html += report.grid([*parts, bars]) if len(shown) == 1 else report.grid(parts) + bars
        html += class_table(report, together)
    else:
        html += report.grid([*parts, *(class_figure(report, [i]) for i, _ in shown)])
    return Section("classes", title, html + "".join(pairs_table(report, i, r) for i, r in shown))


def confusion_figure(report: Report, i: int, run: Run) -> str:
    """Confusion matrix of one run."""
    matrix, names = matrix_of(run), run.names_with_unknown
    accuracy = matrix.diagonal().sum() / matrix.sum()
    pairs = measures.confused_pairs(matrix, 3)
    told = ", ".join(f"{names[t]} as {names[p]} ({n})" for t, p, n, _ in pairs) or "none"
    alt = f"Confusion matrix of {len(names)} classes, {100 * accuracy:.1f} % on the diagonal; largest mistakes: {told}."
    caption = "Percent of each true class (row); rows add up to 100."
    title = report.title(i) or "Confusion matrix"
    return report.figure(
        Plot(report.slug("confusion", i), title, alt, lambda t: figures.confusion(t, matrix, names), caption)
    )


def class_figure(report: Report, which: list[int]) -> str:
    """Accuracy of each class, of several runs together."""
    runs = [report.runs[i] for i in which]
    matrices, names = [matrix_of(r) for r in runs], runs[0].names_with_unknown
    accuracy = measures.class_accuracies(matrices[0])
    order = figures.shown_classes(accuracy)
    alt = "Accuracy of each class: " + ", ".join(
        f"{names[k]} {' / '.join(f'{100 * measures.class_accuracies(m)[k]:.0f}' for m in matrices)} %" for k in order
    )
    many = len(names) > figures.MANY
    first = f" of {text(runs[0].name)}" if len(runs) > 1 else ""
    caption = f"Weakest class{first} first; number of images in brackets."
    caption += f" Of {len(names)} classes the {figures.MANY // 2} weakest and strongest." if many else ""
    labels, colors = [r.name for r in runs], [run_color(i) if report.several else TARGET for i in which]
    draw = lambda t: figures.class_accuracy(t, matrices, names, labels, colors)  # noqa: E731
    return report.figure(Plot(report.slug("classes", which[0]), "Accuracy of each class", alt, draw, caption))


def class_table(report: Report, which: list[int]) -> str:
    """The numbers behind the figure."""
    runs = [report.runs[i] for i in which]
    matrices, names = [matrix_of(r) for r in runs], runs[0].names_with_unknown
    columns = [text(r.name) for r in runs] if report.several else ["accuracy, %"]
    head = [[Cell("class"), Cell("images", "n"), *(Cell(name, "n") for name in columns)]]
    body = [
        [
            Cell(text(name), head=True), Cell(f"{matrices[0][k].sum():,}", "n"),
            *(Cell(percent(rounded(measures.class_accuracies(m)[k])), "n") for m in matrices),
        ]
        for k, name in enumerate(names)
    ]  # fmt: skip
    return details("Values", table("Accuracy of each class on the target, %", head, body))


def rounded(value: float) -> float | None:
    """None for NaN."""
    return float(value) if math.isfinite(value) else None


def pairs_table(report: Report, i: int, run: Run) -> str:
    """The most frequent mistakes."""
    names, pairs = run.names_with_unknown, measures.confused_pairs(matrix_of(run), 10)
    if not pairs:
        return note(f"{run.name}: no mistake on the target.")
    head = [[Cell("true class"), Cell("predicted"), Cell("images", "n"), Cell("of the class, %", "n")]]
    body = [
        [Cell(text(names[t]), head=True), Cell(text(names[p])), Cell(f"{n:,}", "n"), Cell(f"{100 * s:.1f}", "n")]
        for t, p, n, s in pairs
    ]
    name = f"Most frequent mistakes of {run.name}" if report.several else "Most frequent mistakes"
    return details(name, table("Pairs of classes, most frequent first", head, body))


# --------------------------------------------------------------------------------------------- embedding


WAYS = {"tsne": "t-SNE", "umap": "UMAP", "pca": "first two principal components"}


def embedding(report: Report) -> Section:
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


# ----------------------------------------------------------------------------------- confidence, shares


def judged(o: Outcome) -> np.ndarray:
    """Rows whose confidence can be right or wrong: labelled, and not rejected as unknown."""
    return (o.y >= 0) & (o.label < o.probs.shape[1])


def ece(o: Outcome) -> float | None:
    """Expected calibration error of a domain."""
    rows = judged(o)
    return measures.reliability(o.score[rows], o.correct[rows]).ece if rows.any() else None


def calibration(report: Report) -> Section:
    """Reliability diagrams of source and target."""
    title = "Confidence"
    html = paragraph(
        "Reliability: how often predictions that were made with some confidence (from left to right) are right "
        "(height), in 15 bins with 95 % intervals; pale dots are bins of fewer than 5 images. Below the diagonal the "
        "model is too sure. ECE is the mean distance to the diagonal, weighted by the number of images; the lower "
        "panel has these numbers on a logarithmic scale."
    )
    parts = [reliability_of(report, i, run) for i, run in enumerate(report.runs)]
    return Section("confidence", title, html + report.grid(parts))


def reliability_of(report: Report, i: int, run: Run) -> str:
    """The diagram of one run."""
    if run.target is None:
        return note(f"{run.name}: {NO_MODEL}" if report.several else NO_MODEL)
    domains = [
        (o.name, measures.reliability(o.score[rows], o.correct[rows]), TARGET if o.is_target else SOURCE)
        for o in run.outcomes
        if (rows := judged(o)).any()
    ]
    caption = ["Source: held-out images."] if run.sources and held_out(run) else []
    caption += ["Source: training images, on which a model is too sure."] if run.sources and not held_out(run) else []
    if run.target.labelled:
        caption.append(f"Target: with its labels {by_labels()}.")
    else:
        caption.append("The target has no labels: its reliability is left out.")
    if (run.target.label >= run.target.probs.shape[1]).any():
        caption.append("Images that are rejected as unknown are left out.")
    words = " ".join(caption) + estimated_accuracy(run)
    if not domains:
        return paragraph(words, "note")
    told = ", ".join(f"{name} ECE {100 * r.ece:.1f} %" for name, r, _ in domains)
    return report.figure(Plot(
        report.slug("reliability", i), report.title(i), f"Reliability diagram: {told}.",
        lambda t: figures.reliability(t, domains), words,
    ))  # fmt: skip


def source_rows(run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    """Probabilities and labels of the evaluation images of all sources, or None without a source."""
    if not run.sources:
        return None
    probs, y = (np.concatenate(x) for x in zip(*((o.probs, o.y) for o in run.sources), strict=True))
    known = (y >= 0) & (y < len(run.class_names))
    return probs[known], y[known]


def estimated_priors(run: Run) -> tuple[dict[str, np.ndarray], list[str]]:
    """Class shares of the target by BBSE and MLLS, without target labels, and why one is missing."""
    from uda.shift.calibration import bcts, softmax
    from uda.shift.priors import bbse_prior, mlls_prior

    if (rows := source_rows(run)) is None:
        return {}, ["There is no source: its errors by class are unknown, so that no prior can be estimated."]
    probs, y = rows
    target = run.target.probs

    def mlls() -> np.ndarray:
        scores = [np.log(np.maximum(p.astype(np.float64), 1e-30)) for p in (probs, target)]  # logits but for a constant
        t, bias = bcts(scores[0], y)
        return mlls_prior(softmax(scores[1] / t + bias), run.source_prior)

    out, why = {}, []
    for name, make in (("BBSE", lambda: bbse_prior(probs, y, target)), ("MLLS", mlls)):
        try:
            out[name] = make()
        except UDAError as error:
            why.append(f"{name} is left out: {error}")
    return out, why


def estimated_accuracy(run: Run) -> str:
    """What the target's accuracy should be by its confidences alone."""
    from uda.shift.calibration import atc, doc

    if (rows := source_rows(run)) is None:
        return ""
    told = f"ATC {100 * atc(*rows, run.target.probs):.1f} %, DoC {100 * doc(*rows, run.target.probs):.1f} %"
    true = run.target.accuracy
    return f" Target accuracy as estimated without labels: {told}" + (
        "." if true is None else f"; it is {100 * true:.1f} % {by_labels()}."
    )


def class_shares(report: Report) -> Section:
    """Predicted classes of the target against estimated shares."""
    html = paragraph(
        "How often each class is predicted on the target, against its share as estimated without target labels. BBSE "
        "corrects the predictions by the classifier's errors on source images, MLLS takes the shares that make the "
        "target's probabilities (calibrated on the source) most likely. Both assume that only the shares differ "
        "between the domains; a bar far from both marks tells of a class that is predicted too often or too rarely."
    )
    return Section("shares", "Class shares on the target", html + report.grid(
        shares_of(report, i, run) for i, run in enumerate(report.runs)
    ))  # fmt: skip


def shares_of(report: Report, i: int, run: Run) -> str:
    """The figure of one run."""
    if run.target is None:
        return note(f"{run.name}: {NO_MODEL}" if report.several else NO_MODEL)
    from uda.shift.priors import total_variation

    estimates, why = estimated_priors(run)
    names, size = run.names_with_unknown, len(run.names_with_unknown)
    wide = lambda p: np.pad(p, (0, size - len(p)))  # noqa: E731  no source estimate knows of the unknown
    predicted = np.bincount(run.target.label, minlength=size) / len(run.target.label)
    known = run.target.y[run.target.y >= 0]
    true = np.bincount(np.minimum(known, size - 1), minlength=size) / len(known) if len(known) else None
    source = None if run.source_prior is None else wide(run.source_prior)
    estimates = {k: wide(v) for k, v in estimates.items()}
    told = " and ".join(f"{100 * total_variation(predicted, v):.1f} % from {k}" for k, v in estimates.items())
    caption = f"Share of images that would have to change class: {told}" if told else ""
    if true is not None:
        off = f"{100 * total_variation(predicted, true):.1f} % from the true shares {by_labels()}"
        caption += f", {off}" if caption else f"Share of images that would have to change class: {off}"
    caption += "." if caption else ""
    caption += "".join(f" {text(w)}" for w in why)
    alt = "Predicted share of each class on the target: " + ", ".join(
        f"{n} {100 * p:.1f} %" for n, p in zip(names[:60], predicted, strict=False)
    )
    plot = Plot(
        report.slug("shares", i), report.title(i), alt,
        lambda t: figures.priors(t, names, predicted, estimates, source, true), caption,
    )  # fmt: skip
    return report.figure(plot)


# ---------------------------------------------------------------------------------------------- mistakes


def worst(report: Report) -> Section:
    """Pictures that are wrong with the highest confidence."""
    title = "Worst mistakes"
    html = paragraph(
        f"Target images that are wrong with the highest confidence {by_labels()}, at most four of each pair of classes."
    )
    return Section("mistakes", title, html + report.each(lambda i, r: mistakes_of(report, i, r)))


def mistakes_of(report: Report, i: int, run: Run) -> str:
    """The pictures of one run."""
    if (reason := lacking(run)) is not None:
        return note(reason)
    o, names = run.target, run.names_with_unknown
    rows = measures.worst_mistakes(o.score, o.label, o.y, report.mistakes)
    if not len(rows):
        return note("There is no mistake on the target.")
    name = lambda k: names[min(int(k), len(names) - 1)]  # noqa: E731
    if run.images is None:
        head = [[Cell("row"), Cell("predicted"), Cell("truth"), Cell("confidence, %", "n")]]
        body = [
            [Cell(text(o.ids[k]), head=True), Cell(text(name(o.label[k]))), Cell(text(name(o.y[k]))),
             Cell(f"{100 * o.score[k]:.1f}", "n")]
            for k in rows
        ]  # fmt: skip
        return note("The inputs are no images: the rows are listed.") + details(
            "Worst mistakes", table("Most confident first", head, body)
        )
    images = run.images(rows)
    items = ""
    for k, image in zip(rows, images, strict=True):
        told = f"predicted {name(o.label[k])}, truth {name(o.y[k])}, confidence {100 * o.score[k]:.1f} percent"
        css = ' class="pixels"' if max(image.shape) < 64 else ""
        alt = text(f"{o.ids[k]}: {told}")
        items += (
            f'<li><img{css} src="{data_uri(image)}" alt="{alt}" title="{text(o.ids[k])}">'
            f"<span>says <b>{text(name(o.label[k]))}</b>, is <b>{text(name(o.y[k]))}</b><br>"
            f"{100 * o.score[k]:.1f} % sure</span></li>"
        )
    captions = [f"says {name(o.label[k])}, is {name(o.y[k])}\n{100 * o.score[k]:.1f} %" for k in rows]
    report.plots.append(
        Plot(report.slug("mistakes", i), "", "Worst mistakes", lambda t: figures.gallery(t, images, captions))
    )
    return f'<ul class="faces">{items}</ul>'


# -------------------------------------------------------------------------------------------- provenance


def provenance(report: Report) -> Section:
    """Where each run and the figures come from."""
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("directory", lambda r: f"<code>{text(r.path)}</code>"),
        ("started", lambda r: text(r.record.get("started", "unknown"))),
        ("command", lambda r: f"<code>{text(' '.join(r.record.get('argv', [])) or 'unknown')}</code>"),
        ("task", lambda r: text(r.task)),
        ("seed", lambda r: text(r.summary.get("seed"))),
        ("config hash", lambda r: f"<code>{text(r.summary.get('config_hash'))}</code>"),
        ("steps, epochs", lambda r: f"{r.summary['steps']:,}, {r.summary['epochs']:,}"),
        ("device", lambda r: f"{text(r.summary.get('device'))}, {r.summary.get('world_size', 1)} process(es), "
                             f"{r.summary.get('peak_memory_mib', 0):,.0f} MiB"),
        ("checkpoint evaluated", evaluated),
        ("versions", lambda r: text(", ".join(f"{k} {v}" for k, v in (r.summary.get("versions") or {}).items()))),
    ]  # fmt: skip
    dots = [dot(run_color(i)) if report.several else "" for i in range(len(report.runs))]
    head = [[Cell("what"), *(Cell(f"{d}{text(r.name)}") for d, r in zip(dots, report.runs, strict=True))]]
    body = [[Cell(text(name), head=True), *(Cell(value(r)) for r in report.runs)] for name, value in rows]
    html = table("Of each run", head, body)
    html += paragraph(
        "Results and curves are what the run itself wrote. Classes, features, confidence, shares and mistakes come "
        "from passing the evaluation images of each domain once more through the checkpoint named above."
    )
    return Section("provenance", "Where this comes from", html)


def evaluated(run: Run) -> str:
    """Which weights the figures of the model are of."""
    if run.checkpoint is None:
        return "none"
    tag = f" {oracle()}" if run.which == "oracle" else ""
    target = run.target
    got = "" if target is None or target.accuracy is None else f"; target accuracy {100 * target.accuracy:.1f} %"
    return f"<code>{text(run.checkpoint.name)}</code>, {RULES[run.which]}{tag}, step {run.checkpoint_step}{got}"
