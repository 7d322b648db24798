"""Tables as Markdown, LaTeX and csv."""

from __future__ import annotations

from uda.bench.tables import Table

FORMATS = ("md", "csv", "latex")


def render(table: Table, format: str = "md", caption: bool = True) -> str:
    """A table as text, with a newline at the end."""
    if format == "csv":
        return table.numbers.to_csv(index=False, float_format="%.6g")
    return _latex(table, caption) if format == "latex" else _markdown(table, caption)


def _markdown(table: Table, caption: bool) -> str:
    rows = [
        [f"**{cell}**" if (i, j) in table.bold else cell.replace("|", "\\|") for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    head = [h.replace("|", "\\|") for h in table.head]
    widths = [max(len(r[j]) for r in [head, *rows]) for j in range(len(head))]

    def line(cells: list[str]) -> str:
        first, *rest = [
            c.ljust(w) if j == 0 else c.rjust(w) for j, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if j == 0 else "-" * (w + 1) + ":" for j, w in enumerate(widths)) + "|"
    text = "\n".join([line(head), rule, *map(line, rows)]) + "\n"
    return text + (f"\n{table.caption}\n" if caption else "")


def _escape(text: str) -> str:
    for plain, escaped in (("\\", r"\textbackslash "), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#"),
                           ("->", r"$\to$"), ("±", r"$\pm$")):  # fmt: skip
        text = text.replace(plain, escaped)
    return text


def _latex(table: Table, caption: bool) -> str:
    rows = [
        [rf"\textbf{{{_escape(c)}}}" if (i, j) in table.bold else _escape(c) for j, c in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    body = [" & ".join(row) + r" \\" for row in rows]
    tabular = [
        rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule",
        " & ".join(map(_escape, table.head)) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    if not caption:
        return "\n".join(tabular) + "\n"
    return "\n".join(
        [r"\begin{table}", r"\centering", rf"\caption{{{_escape(table.caption)}}}", *tabular, r"\end{table}"]
    ) + "\n"  # fmt: skip
