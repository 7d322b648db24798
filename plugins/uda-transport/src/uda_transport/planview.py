"""What a matching across feature spaces leaves behind: plans, a picture of the feature plan, and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from uda_transport.across import Crossed


def _numpy(array: Any) -> np.ndarray:
    return array.detach().cpu().numpy() if hasattr(array, "detach") else array


def in_order(plan: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orders of rows and columns that put a plan near its diagonal, if it is like a band.

    By the second singular vectors of the plan between its marginals (correspondence analysis).
    """
    rows, columns = plan.sum(1).clip(1e-300), plan.sum(0).clip(1e-300)
    scaled = plan / np.sqrt(rows)[:, None] / np.sqrt(columns)[None, :]
    left, _, right = np.linalg.svd(scaled, full_matrices=False)
    k = min(1, left.shape[1] - 1)
    return np.argsort(left[:, k] / np.sqrt(rows)), np.argsort(right[k] / np.sqrt(columns))


def blocks(plan: np.ndarray, most: int = 200) -> np.ndarray:
    """The plan summed over blocks of rows and columns, at most ``most`` a side, so that a picture shows all of it."""
    for axis in (0, 1):
        edges = np.linspace(0, plan.shape[axis], min(most, plan.shape[axis]) + 1).astype(int)[:-1]
        plan = np.add.reduceat(plan, edges, axis=axis)
    return plan


def draw_plan(plan: np.ndarray, path: Path, title: str) -> None:
    """PNG of a feature plan ``[d, e]``: mass over the product plan's, ordered to show structure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = in_order(plan)
    share = blocks(plan[rows][:, columns])
    share = share / max(float(share.mean()), 1e-300)
    figure = Figure(figsize=(6, 5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        np.log10(share + 0.01), aspect="auto", cmap="viridis", interpolation="nearest", vmin=-2,
        extent=(0, plan.shape[1], plan.shape[0], 0),
    )  # fmt: skip
    axes.set_xlabel(f"target features ({plan.shape[1]}), ordered")
    axes.set_ylabel(f"source features ({plan.shape[0]}), ordered")
    axes.set_title(title)
    figure.colorbar(image, label="mass over that of the product plan, log10")
    figure.tight_layout()
    figure.savefig(path)


def write_plans(folder: str | Path, name: str, found: Crossed, method: str, min_mass: float) -> None:
    """Write ``<name>.npz``, ``<name>.png`` and ``<name>.json`` into a folder.

    The archive holds ``samples`` ``[n', m']``, ``features`` ``[d, e]`` in float32, ``source_rows`` and ``target_rows``
    (pool positions), ``probs`` ``[m, C]`` and ``mass`` ``[m]``.
    """
    folder, plans = Path(folder), found.plans
    folder.mkdir(parents=True, exist_ok=True)
    features = _numpy(plans.features)
    np.savez_compressed(
        folder / f"{name}.npz", samples=_numpy(plans.samples).astype(np.float32), features=features.astype(np.float32),
        source_rows=found.source_rows, target_rows=found.target_rows, probs=found.probs, mass=found.mass,
    )  # fmt: skip
    figures = {
        "method": method, "cost": plans.cost, "objective": plans.objective, "rounds": plans.steps,
        "converged": plans.converged, "epsilon": found.epsilon, "agreement": found.agreement,
        "labelled_share": float((found.mass >= min_mass).mean()), "mass": float(_numpy(plans.samples).sum()),
        "matched_samples": [len(found.source_rows), len(found.target_rows)], "tried": found.tried,
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw_plan(features, folder / f"{name}.png", f"{method.upper()}: features, cost {plans.cost:.3f}")
