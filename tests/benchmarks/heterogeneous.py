"""COOT and UCOOT across feature spaces on Office-Caltech-10: tables and figure of docs/methods/heterogeneous.md.

    python tests/benchmarks/heterogeneous.py tasks OUT.jsonl [--draws 10] [--only surf_A:googlenet_D,...]
    python tests/benchmarks/heterogeneous.py outliers OUT.jsonl
    python tests/benchmarks/heterogeneous.py scale OUT.jsonl
    python tests/benchmarks/heterogeneous.py tables OUT.jsonl [--figure docs/methods/heterogeneous_outliers.svg]

``tasks``, ``outliers`` and ``scale`` append one line a figure; lines that are there are not made again, so a run that
was stopped goes on. The data are read from ``UDA_SHARED_DATA`` or ``../shared/data``. Settings are the defaults of the
estimators but for ``max_iter`` and, with outliers, ``epsilon`` (0.05: noise inflates the scale of costs).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 6
SURF, DEEP = ("surf_A", "surf_C", "surf_D"), ("googlenet_A", "googlenet_D")
TASKS = [(s, t) for s in SURF for t in DEEP] + [(t, s) for s in SURF for t in DEEP]
CURVE = ("surf_C", "googlenet_A")
SHARES = (0.0, 0.1, 0.2, 0.3)


def data() -> Any:
    """The arrays of Office-Caltech-10."""
    return np.load(Path(os.environ.get("UDA_SHARED_DATA", "../shared/data")) / "office_caltech10.npz")


def draw(arrays: Any, domain: str, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """20 samples a class (8 of DSLR): features, labels; then those of all others."""
    x, y = arrays[f"{domain}_x"].astype(np.float64), arrays[f"{domain}_y"].astype(np.int64)
    number = 8 if domain.endswith("D") else 20
    rows = np.concatenate([rng.permutation(np.flatnonzero(y == c))[:number] for c in range(10)])
    rows = rng.permutation(rows)
    rest = np.setdiff1d(np.arange(len(y)), rows)
    return x[rows], y[rows], x[rest], y[rest]


def labelled(y: np.ndarray, budget: int) -> np.ndarray:
    """The first ``budget`` samples of each class with their label, -1 for the others."""
    known = np.full(len(y), -1)
    for c in range(10):
        rows = np.flatnonzero(y == c)[:budget]
        known[rows] = c
    return known


def baselines(x: np.ndarray, known: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Labels of all samples by the labelled ones alone, and by a random matching."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(seed)
    out = {"random plan": rng.permutation(np.arange(len(x)) % 10)}
    if (rows := known >= 0).any():
        z = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
        for name, model in (("1-NN", KNeighborsClassifier(1)), ("logistic", LogisticRegression(C=0.01, max_iter=300))):
            out[name] = model.fit(z[rows], known[rows]).predict(z)
    return out


def tasks(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Accuracies of all tasks, budgets and draws."""
    from uda_transport import COOTClassifier, UCOOTClassifier

    arrays = data()
    wanted = {tuple(p.split(":")) for p in args.only.split(",")} if args.only else set(TASKS)
    for number in range(args.draws):
        for source, target in [t for t in TASKS if t in wanted]:
            rng = np.random.default_rng([number, TASKS.index((source, target))])
            xs, ys, _, _ = draw(arrays, source, rng)
            xt, yt, xr, yr = draw(arrays, target, rng)
            for budget in (0, 1, 3):
                key = f"task/{source}/{target}/{budget}/{number}"

                def make(known=labelled(yt, budget), xs=xs, ys=ys, xt=xt, yt=yt, xr=xr, yr=yr, number=number):
                    free = known < 0
                    out = {n: (v[free] == yt[free]).mean() for n, v in baselines(xt, known, number).items()}
                    for name, cls in (("COOT", COOTClassifier), ("UCOOT", UCOOTClassifier)):
                        fitted = cls(max_iter=ROUNDS).fit(xs, ys, xt, known)
                        out[f"{name} plan"] = (fitted.target_probs_.argmax(1)[free] == yt[free]).mean()
                        out[f"{name} classifier"] = (fitted.predict(xt)[free] == yt[free]).mean()
                        out[f"{name} unseen"] = (fitted.predict(xr) == yr).mean()
                        out[f"{name} agreement"] = fitted.agreement_
                    return {k: float(v) for k, v in out.items()}

                yield key, make


def outliers(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Accuracy with outliers in the target, three labelled samples a class."""
    from uda_transport import COOTClassifier, UCOOTClassifier

    arrays = data()
    for number in range(args.draws):
        rng = np.random.default_rng([number, 99])
        xs, ys, _, _ = draw(arrays, CURVE[0], rng)
        xt, yt, _, _ = draw(arrays, CURVE[1], rng)
        for kind in ("noise", "classes", "shares"):
            for share in SHARES:

                def make(kind=kind, share=share, xs=xs, ys=ys, xt=xt, yt=yt, number=number):
                    a, la, b, lb = contaminated(kind, share, (xs, ys), (xt, yt), number)
                    known = labelled(lb, 3)
                    true = (lb >= 0) & (known < 0)
                    out = {}
                    for name, cls in (("COOT", COOTClassifier), ("UCOOT", UCOOTClassifier)):
                        fitted = cls(epsilon=0.05, max_iter=ROUNDS).fit(a, la, b, known)
                        out[name] = (fitted.target_probs_.argmax(1)[true] == lb[true]).mean()
                        out[f"{name} mass of outliers"] = fitted.target_mass_[lb < 0].mean() if (lb < 0).any() else 1.0
                        out[f"{name} mass of others"] = fitted.target_mass_[lb >= 0].mean()
                    return {k: float(v) for k, v in out.items()}

                yield f"outliers/{kind}/{share}/{number}", make


def contaminated(kind: str, share: float, source: tuple, target: tuple, seed: int) -> tuple:
    """Target with outliers (label -1) as a share of all its rows.

    ``noise``: rows of shuffled columns, twice as far out; ``classes``: the source loses classes 7 to 9, whose
    target samples are then the outliers, cut or repeated to the share; ``shares``: no outliers, but the target's
    classes 0 to 4 lose three times the share of their samples.
    """
    rng = np.random.default_rng([seed, int(100 * share), 5])
    (a, la), (b, lb) = source, target
    if kind == "classes":
        a, la = a[la < 7], la[la < 7]
        others, b, lb = b[lb >= 7], b[lb < 7], lb[lb < 7]
    if kind == "shares":
        kept = (lb > 4) | (rng.random(len(lb)) >= 3 * share)
        return a, la, b[kept], lb[kept]
    count = round(share / (1 - share) * len(b))
    if kind == "classes":
        extra = others[rng.permutation(len(others) * 2)[:count] % len(others)]
    else:
        extra = 2 * np.stack([column[rng.integers(0, len(b), count)] for column in b.T], 1)
    return a, la, np.concatenate([b, extra]), np.concatenate([lb, np.full(count, -1)])


def scale(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Seconds and peak memory for n samples a domain of 100 and 120 features."""
    from uda_transport.across import cross
    from uda_transport.memory import bytes_needed

    for size in (500, 1000, 2000, 4000, 10000):
        for method in ("coot", "ucoot"):

            def make(size=size, method=method):
                rng = np.random.default_rng(0)
                labels = np.arange(size) % 10
                hidden = rng.normal(size=(10, 20))[labels] + rng.normal(size=(size, 20))
                x, y = hidden @ rng.normal(size=(20, 100)), hidden @ rng.normal(size=(20, 120))
                began = time.perf_counter()
                found = cross(x, y, labels, 10, method=method, max_iter=5)
                seconds = time.perf_counter() - began
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
                estimate = bytes_needed(size, 100, size, 120) / 2**20
                rounds = found.plans.steps
                return {"seconds": seconds, "rounds": rounds, "process peak MiB": peak, "estimate MiB": estimate}

            yield f"scale/{size}/{method}", make


def tables(lines: dict[str, dict[str, float]], figure: str | None) -> None:
    """Print the tables; draw the curve."""
    groups: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, values in lines.items():
        kind, *rest = key.split("/")
        for name, value in values.items():
            if kind == "task":
                groups["budget", rest[2]][name].append(value)
                groups["task", rest[0], rest[1], rest[2]][name].append(value)
            elif kind == "outliers":
                groups["outliers", rest[0], rest[1]][name].append(value)
            else:
                groups["scale", *rest][name].append(value)

    def cell(values: list[float] | None) -> str:
        return f"{100 * np.mean(values):.1f} ± {100 * np.std(values):.1f}" if values else "-"

    ours = [f"{m} {what}" for m in ("COOT", "UCOOT") for what in ("plan", "classifier", "unseen")]
    names = ("random plan", "1-NN", "logistic", *ours)
    print("| labels a class |", " | ".join(names), "|\n|" + "---|" * (len(names) + 1))
    for key in [k for k in groups if k[0] == "budget"]:
        print(f"| {key[1]} |", " | ".join(cell(groups[key].get(n)) for n in names), "|")
    few = ("logistic", "COOT plan", "UCOOT plan")
    print("\n| task |", " | ".join(f"{n}, {b}" for b in "013" for n in few[b == "0" :]), "|\n|" + "---|" * 9)
    for s, t in TASKS:
        found = [cell(groups.get(("task", s, t, b), {}).get(n)) for b in "013" for n in few[b == "0" :]]
        print(f"| {s} to {t} |", " | ".join(found), "|")
    for kind in ("noise", "classes"):
        print(f"\n| outliers ({kind}) | COOT | UCOOT | mass of an outlier in UCOOT | of another |\n{'|---' * 5}|")
        for share in SHARES:
            g = groups.get(("outliers", kind, str(share)), {})
            masses = [f"{np.mean(g.get(f'UCOOT mass of {w}', [np.nan])):.2f}" for w in ("outliers", "others")]
            print("|", " | ".join([f"{share:.0%}", cell(g.get("COOT")), cell(g.get("UCOOT")), *masses]), "|")
    print(f"\n| samples that half of the classes lose | COOT | UCOOT |\n{'|---' * 3}|")
    for share in SHARES:
        g = groups.get(("outliers", "shares", str(share)), {})
        print("|", " | ".join([f"{3 * share:.0%}", cell(g.get("COOT")), cell(g.get("UCOOT"))]), "|")
    print("\n| n a domain | method | seconds a round | process peak, MiB | estimate, MiB |\n|---|---|---|---|---|")
    for key in [k for k in groups if k[0] == "scale"]:
        g = {n: v[0] for n, v in groups[key].items()}
        each = g["seconds"] / g["rounds"]
        print(f"| {key[1]} | {key[2]} | {each:.2f} | {g['process peak MiB']:.0f} | {g['estimate MiB']:.0f} |")
    if figure:
        draw_curve(groups, figure)


def draw_curve(groups: dict, path: str) -> None:
    """Accuracy against the share of outliers, for both kinds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "uda"
    panels, axes = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True)
    for axis, kind in zip(axes, ("noise", "classes"), strict=True):
        for name, marker in (("COOT", "o"), ("UCOOT", "s")):
            values = [groups[("outliers", kind, str(s))][name] for s in SHARES]
            means, spread = [100 * np.mean(v) for v in values], [100 * np.std(v) for v in values]
            axis.errorbar([100 * s for s in SHARES], means, spread, marker=marker, capsize=3, label=name)
        axis.set_xlabel(f"outliers in the target, % ({kind})")
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(frameon=False)
    panels.tight_layout()
    panels.savefig(path, metadata={"Date": None})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tasks", "outliers", "scale", "tables"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--only", default="")
    parser.add_argument("--figure")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Stop after about this long.")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    text = args.out.read_text().splitlines() if args.out.exists() else []
    lines = {r["key"]: r["values"] for r in map(json.loads, text)}
    if args.what == "tables":
        tables(lines, args.figure)
        return
    began = time.monotonic()
    with args.out.open("a") as file:
        for key, make in {"tasks": tasks, "outliers": outliers, "scale": scale}[args.what](args):
            if key not in lines:
                file.write(json.dumps({"key": key, "values": make()}) + "\n")
                file.flush()
            if time.monotonic() - began > args.seconds:
                return


if __name__ == "__main__":
    main()
