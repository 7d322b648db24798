"""DW-GCS and KTF on real data: the tables of docs/methods/transport.md.

    python tests/benchmarks/estimators.py dwgcs [--seeds 5]
    python tests/benchmarks/estimators.py ktf [--seeds 3]

``dwgcs``: breast cancer of scikit-learn, where training samples are drawn with a preference for one side of the first
principal component (or of the median of a feature) and test samples for the other; and Office-Caltech-10 (SURF, 300
samples a domain, 20 principal components), if it is there (``UDA_SHARED_DATA`` or ``../shared/data``). ``ktf``: SURF
and GoogleNet features of Office-Caltech-10 with three labelled target samples a class, beside a source of noise.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def arrays() -> dict[str, np.ndarray] | None:
    """Office-Caltech-10, or None."""
    path = Path(os.environ.get("UDA_SHARED_DATA", "../shared/data")) / "office_caltech10.npz"
    return np.load(path) if path.exists() else None


def shifted(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Breast cancer split by a preference: 0.8 of one side trains and 0.2 of the other."""
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    side = PCA(1).fit_transform(x)[:, 0] if kind == "component" else x[:, 0]
    chance = np.where(side > np.median(side), 0.8, 0.2)
    train = rng.random(len(y)) < chance
    return x[train], y[train], x[~train], y[~train]


def dwgcs(seeds: int) -> None:
    """Accuracy of plain regression, of weights alone and of double weighting."""
    from uda_transport import DWGCSClassifier

    table = defaultdict(lambda: defaultdict(list))
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        tasks = {f"breast cancer, {kind}": shifted(kind, rng) for kind in ("component", "feature")}
        if (data := arrays()) is not None:
            for s, t in (("A", "C"), ("C", "A"), ("A", "D"), ("C", "D")):
                xs, xt = data[f"surf_{s}_x"].astype(float), data[f"surf_{t}_x"].astype(float)
                rows = rng.permutation(len(xs))[:300], rng.permutation(len(xt))[:300]
                scaled = [StandardScaler().fit_transform(x[r]) for x, r in zip((xs, xt), rows, strict=True)]
                basis = PCA(20, random_state=0).fit(np.concatenate(scaled))
                a, b = (basis.transform(x) for x in scaled)
                tasks[f"SURF {s}->{t}"] = (a, data[f"surf_{s}_y"][rows[0]], b, data[f"surf_{t}_y"][rows[1]])
        for task, (x, y, t, truth) in tasks.items():
            plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x, y)
            table[task]["logistic regression"].append((plain.predict(t) == truth).mean())
            for name, leave in (("weights of the source alone", 0.0), ("DW-GCS", None)):
                fitted = DWGCSClassifier(leave=leave).fit(x, y, t)
                table[task][name].append((fitted.predict(t) == truth).mean())
            print(seed, task, {k: round(100 * v[-1], 1) for k, v in table[task].items()}, fitted.leave_, flush=True)
    show(table)


def ktf(seeds: int) -> None:
    """Accuracy on unlabelled target samples, by the source that was used."""
    from uda_transport.ktf import KTFClassifier, noise_domain

    data = arrays()
    if data is None:
        raise SystemExit("office_caltech10.npz is not there: set UDA_SHARED_DATA")
    table = defaultdict(lambda: defaultdict(list))
    for seed in range(seeds):
        for source, target in (("surf_A", "googlenet_D"), ("surf_C", "googlenet_A"), ("googlenet_A", "surf_C")):
            rng = np.random.default_rng(seed)
            xt, yt = data[f"{target}_x"].astype(float), data[f"{target}_y"].astype(int)
            xt = xt / np.linalg.norm(xt, axis=1, keepdims=True)
            known = np.full(len(yt), -1)
            for c in np.unique(yt):
                known[rng.permutation(np.flatnonzero(yt == c))[:3]] = c
            free = known < 0
            xs, ys = data[f"{source}_x"].astype(float), data[f"{source}_y"].astype(int)
            z = xt / np.maximum(xt.std(0), 1e-9)
            alone = LogisticRegression(C=0.01, max_iter=2000).fit(z[~free], known[~free])
            sources = {
                "KTF, mu = 0.1": (xs, ys, {}),
                "KTF, mu = 1": (xs, ys, {"mu": 1.0}),
                "KTF, source of noise": (*noise_domain(10, seed=seed), {}),
                "KTF, no source (beta = mu = 0)": (xs, ys, {"beta": 0.0, "mu": 0.0}),
            }
            row = table[f"{source} -> {target}"]
            row["logistic regression on the labelled"].append((alone.predict(z[free]) == yt[free]).mean())
            for name, (x, y, options) in sources.items():
                fitted = KTFClassifier(random_state=seed, **options).fit(x, y, xt, known)
                row[name].append((fitted.labels_[free] == yt[free]).mean())
            print(seed, source, target, {k: round(100 * v[-1], 1) for k, v in row.items()}, flush=True)
    show(table)


def show(table: dict[str, dict[str, list[float]]]) -> None:
    """A Markdown table, mean and standard deviation in percent."""
    names = list(next(iter(table.values())))
    print("| task | " + " | ".join(names) + " |", "|---" + "|---:" * len(names) + "|", sep="\n")
    for task, row in table.items():
        cells = (f"{100 * np.mean(row[n]):.1f} ± {100 * np.std(row[n]):.1f}" for n in names)
        print(f"| {task} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["dwgcs", "ktf"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    {"dwgcs": dwgcs, "ktf": ktf}[arguments.what](arguments.seeds)
