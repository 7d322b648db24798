"""Several sounds at once: NOTELA on generated spectrograms, from a source model and unlabelled target data.

    python docs/examples/spectrograms.py [--folder DIR] [--seed 0]

Each of eight classes is a tone with an overtone, at frequencies of its own; a clip has any number of them. The target
has another gain, a tilt over the frequencies, and noise. The source model is trained, its data are deleted, and the
target is adapted to. Measures: class-mean average precision, and mean average precision over clips.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import yaml

from uda.cli import main as uda

CLASSES, BINS, FRAMES = 8, 32, 32


def clips(n: int, draw: np.random.Generator, target: bool) -> tuple[np.ndarray, np.ndarray]:
    """Spectrograms in [0, 1], ``[n, 1, BINS, FRAMES]``, and which classes they hold ``[n, CLASSES]``."""
    y = draw.random((n, CLASSES)) < 0.25
    bins, frames = np.arange(BINS)[:, None], np.arange(FRAMES)[None]
    power = np.zeros((n, BINS, FRAMES))
    for i, c in zip(*np.nonzero(y), strict=True):
        start, length = draw.integers(0, FRAMES - 8), draw.integers(8, 20)
        active = (frames >= start) & (frames < start + length)
        wobble = 0.7 * np.sin(2 * np.pi * frames / draw.uniform(6, 14))
        for pitch, share in ((2 + 1.7 * c, 1.0), (16 + 1.6 * c, 0.5)):
            tone = np.exp(-((bins - pitch - wobble) ** 2) / 1.2)
            power[i] += draw.uniform(0.6, 1.4) * share * tone * active
    power += 0.05 * draw.random(power.shape)
    if target:  # a far microphone: less gain, high frequencies damped, background
        power = 0.5 * power * np.linspace(1.2, 0.5, BINS)[:, None] + 0.35 * draw.random(power.shape)
    return np.log1p(4 * power)[:, None].clip(0, 2.5).astype(np.float32) / 2.5, y.astype(np.float32)


def run(folder: Path, name: str, config: dict) -> dict:
    """One ``uda fit``; its summary."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    words = ["fit", "--config", str(folder / f"{name}.yaml"), f"--run_dir={folder / name}", "--select_by=im"]
    if code := uda(words):
        raise SystemExit(f"uda fit ended with {code}")
    return json.loads((folder / name / "summary.json").read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(args.seed)
    (a, y_a), (b, y_b) = clips(800, draw, False), clips(800, draw, True)
    np.savez(folder / "both.npz", studio_x=a, studio_y=y_a, field_x=b, field_y=y_b)
    np.savez(folder / "target.npz", field_x=b, field_y=y_b)

    def config(file: str, source: str | None, epochs: int, rate: float, **model) -> dict:
        return {
            "seed_everything": args.seed,
            "model": {
                "backbone": "small_cnn", "bottleneck": 64,
                "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": rate}},
                "schedule": {"class_path": "uda.optim.Constant"}, **model,
            },
            "data": {
                "reader": {"class_path": "Arrays", "init_args": {"path": str(folder / file), "multi_label": True}},
                "source": source, "target": "field", "batch_size": 32,
            },
            "trainer": {
                "max_epochs": epochs, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
            },
        }  # fmt: skip

    before = run(folder, "source", config("both.npz", "studio", 12, 1e-3))
    (folder / "both.npz").unlink()
    # as published for audio, but for BatchNorm's statistics, which move to the target here
    notela = {"class_path": "NOTELA", "init_args": {"neighbours": 5, "strength": 1.0, "mode": "offline"}}
    start = str(folder / "source" / "checkpoints" / "last.ckpt")
    after = run(folder, "notela", config("target.npz", None, 10, 1e-4, plugins={"refine": notela}, init_from=start))
    for name, summary in (("source model", before), ("NOTELA", after)):
        values = [100 * summary[m]["last"] for m in ("class_mean_ap", "mean_ap")]
        print(f"{name:13} class-mean average precision {values[0]:.1f}, over clips {values[1]:.1f}")


if __name__ == "__main__":
    main()
