"""Pictures that are wrong with the highest confidence."""

from __future__ import annotations

from uda.report import figures, measures
from uda.report.collect import Run
from uda.report.html import Cell, Section, by_labels, details, note, paragraph, table, text
from uda.report.sections.base import Report, lacking
from uda.report.style import Plot, data_uri


def section(report: Report) -> Section:
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
