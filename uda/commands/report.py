"""``uda report``: one HTML page on one or several finished runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from uda.errors import UDAError


def main(argv: list[str]) -> int:
    """``uda report RUN [RUN ...]``.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(
        "uda report", description="One HTML page, with all its figures inside, on one or several finished runs."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run; the first is compared with")
    parser.add_argument("-o", "--out", type=Path, help="the page (RUN/report.html; report.html for several runs)")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument("--format", choices=("png", "svg"), help="write each figure as a file too, in <out>_figures/")
    parser.add_argument(
        "--checkpoint",
        choices=("last", "selected", "oracle", "none"),
        default="last",
        help="whose weights are evaluated (last); none: only what the run wrote",
    )
    parser.add_argument("--embedding", choices=("tsne", "umap", "pca", "none"), default="tsne", help="(tsne)")
    parser.add_argument(
        "--max_samples", "--max-samples", type=int, default=1000, help="of each domain in the embedding; 0: all (1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the embedding and its samples (0)")
    parser.add_argument("--mistakes", type=int, default=24, help="number of pictures of mistakes (24)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (a GPU where there is one)")
    parser.add_argument("--root", help="folder of the data, where it is not the one in the config")
    args = parser.parse_args(argv[1:])
    return report(args)


def report(args: argparse.Namespace) -> int:
    """Read the runs, evaluate their checkpoints, and write the page.

    Raises:
        UDAError: no finished run, no such checkpoint, or files that would be overwritten.
    """
    from uda.report.measures import check_embedding

    out = args.out or (Path(args.runs[0]).expanduser() / "report.html" if len(args.runs) == 1 else Path("report.html"))
    figures = out.with_name(f"{out.stem}_figures")
    if not args.force:
        refuse_to_overwrite(out, figures if args.format else None)
    if args.max_samples < 0 or args.mistakes < 0:
        raise UDAError("--max_samples and --mistakes must not be negative.")
    check_embedding(args.embedding)
    from uda.console import quiet
    from uda.report.collect import evaluate, read_run, short_names
    from uda.report.page import figure_files, render
    from uda.report.sections import Report

    quiet()
    paths = [Path(r).expanduser() for r in args.runs]
    if len({p.resolve() for p in paths}) < len(paths):
        raise UDAError("a run is named twice.")
    runs = [read_run(p, name) for p, name in zip(paths, short_names(paths), strict=True)]
    if len({r.multi_label for r in runs}) > 1:
        odd = next(r for r in runs if r.multi_label != runs[0].multi_label)
        raise UDAError(f"{runs[0].path} and {odd.path}: one is multi-label and one is not; make a report of each.")
    for run in runs:
        if run.multi_label:
            run.notes.append(
                "The task is multi-label: parts that need one class a sample (classes, features, confidence, shares, "
                "mistakes) are left out."
            )
            continue
        if args.checkpoint == "none":
            run.notes.append("No checkpoint was evaluated, as asked for: figures that need the model are left out.")
            continue
        if not any((run.path / "checkpoints").glob("*.ckpt")) and not any(run.path.glob("hpc_ckpt_*.ckpt")):
            run.notes.append("The run kept no checkpoint: figures that need the model are left out.")
            continue
        print(f"{run.name}: passing the evaluation images through the {args.checkpoint} checkpoint", flush=True)
        evaluate(run, args.checkpoint, args.device, args.root)
    made = Report(runs, args.embedding, args.max_samples, args.seed, args.mistakes)
    text = render(made)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"{out}: {len(made.plots)} figures, {len(text) / 2**20:.1f} MiB")
    if args.format:
        print(f"{len(figure_files(made, figures, args.format))} files in {figures}")
    for run in runs:
        for note in run.notes:
            print(f"uda: {run.name}: {note}", file=sys.stderr)
    return 0


def refuse_to_overwrite(page: Path, figures: Path | None) -> None:
    """Check that nothing is in the way.

    Raises:
        UDAError: something is.
    """
    if page.is_dir():
        raise UDAError(f"--out {page}: it is a directory; name a file.")
    if page.exists():
        raise UDAError(f"{page} exists: name another file with --out, or overwrite it with --force.")
    if figures is not None and figures.is_dir() and any(figures.iterdir()):
        raise UDAError(f"{figures} exists and is not empty: name another page with --out, or use --force.")
