"""What the runs reached."""

from __future__ import annotations

from uda.report.collect import Run
from uda.report.figures import run_color
from uda.report.html import Cell, Section, bullets, by_labels, dot, note, oracle, paragraph, table, text
from uda.report.sections.base import RULES, Report, held_out, method
from uda.report.sections.remarks import remarks
from uda.run.figures import percent

#: of each measure: its column, the unit of the table, and several of it
WORDS = {
    "target_accuracy": ("target", "Accuracy", "Accuracies"),
    "target_class_accuracy": ("target, class mean", "Accuracy", "Accuracies"),
    "class_mean_ap": ("target, mean over classes", "Average precision", "Average precisions"),
    "mean_ap": ("target, mean over samples", "Average precision", "Average precisions"),
}


def section(report: Report) -> Section:
    """Accuracy by the three rules, and what stands out."""
    html = cards(report.runs[0]) if not report.several else ""
    html += results_table(report)
    labelled = any(r.summary[r.measures[0]]["last"] is not None for r in report.runs)
    if labelled:
        html += paragraph(
            f"{WORDS[report.runs[0].measures[0]][2]} on the target are measured with its labels. <em>Last</em> and "
            "<em>selected</em> (the epoch with the best label-free score) are chosen without them; "
            f"{oracle()} is the best validation by target labels, an upper bound that nobody without labels can have. "
            f"{by_labels()} marks what is drawn with target labels, for display only."
        )
    else:
        html += note("The target has no labels: accuracies on it, and all that is made from them, are left out.")
    html += bullets(remarks(report))
    for run in report.runs:
        html += "".join(note(f"{run.name}: {n}" if report.several else n) for n in run.notes)
    return Section("results", "Results", html)


def cards(run: Run) -> str:
    """The large figures of one run."""
    s, reached = run.summary, run.summary[run.measures[0]]
    chosen = s["selection"]
    at = "" if chosen["epoch"] is None else f", epoch {chosen['epoch']}"
    best = run.row_of("oracle")
    best_at = "" if best is None else f", epoch {best['epoch']}"
    shown = [
        ("source", percent(s.get(run.source_headline)), "source, held out" if held_out(run) else "source", ""),
        ("last", percent(reached["last"]), "target, last epoch", ""),
        ("selected", percent(reached["selected"]), f"target, selected by {chosen['score']}{at}", ""),
        (
            "oracle", percent(reached["oracle"]),
            f"target, oracle{best_at}", "oracle",
        ),
    ]  # fmt: skip
    rows = "".join(
        f'<div class="card {css if value != "-" else ""}"><b>{value}</b><span>{text(words)}</span></div>'
        for _, value, words, css in shown
        if value != "-"
    )
    return f'<div class="cards">{rows}</div>'


def results_table(report: Report) -> str:
    """Runs over figures."""
    head = [
        [
            Cell("run", rows=2), Cell("method", rows=2), Cell("source", "n", rows=2),
            *(Cell(WORDS[m][0], columns=3) for m in report.runs[0].measures),
            Cell("selected by", rows=2), Cell("time, s", "n", rows=2),
        ],
        [Cell("last", "n"), Cell("selected", "n"), Cell(oracle(), "n oracle")] * 2,
    ]  # fmt: skip
    body = []
    for i, run in enumerate(report.runs):
        s, chosen = run.summary, run.summary["selection"]
        values = [
            Cell(percent(s[kind][rule]), "n oracle" if rule == "oracle" else "n")
            for kind in run.measures
            for rule in RULES
        ]
        by = f"{chosen['score']}, epoch {chosen['epoch']}"
        if chosen["epoch"] is None:
            by = f"{chosen['score']}: none"
        mark = dot(run_color(i)) if report.several else ""
        body.append([
            Cell(f"{mark}{text(run.name)}", head=True), Cell(text(method(run))),
            Cell(percent(s.get(run.source_headline)), "n"), *values, Cell(text(by)), Cell(f"{s['seconds']:.0f}", "n"),
        ])  # fmt: skip
    word = WORDS[report.runs[0].measures[0]][1]
    return table(f"{word} in percent, as in each run's summary.json", head, body)
