"""Several sounds at once: NOTELA on generated spectrograms, from a source model and unlabelled target data.

    python docs/examples/spectrograms.py [--folder DIR] [--seed 0] [--freeze_statistics] [--only_data]

Each of eight classes is a tone with an overtone, at frequencies of its own; a clip has any number of them. The target
has another gain, a tilt over the frequencies, and noise. The source model is trained, its data are deleted, and the
target is adapted to, by configs/spectrograms_source_only.yaml and configs/spectrograms_notela.yaml. Measures:
class-mean average precision, and mean average precision over clips.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from uda.cli import main as uda

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
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


def run(folder: Path, config: str, *words: str) -> dict:
    """One ``uda fit`` of a config; its summary."""
    place = folder / config
    more = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    if code := uda(["fit", "--config", str(CONFIGS / f"{config}.yaml"), f"--run_dir={place}", *more, *words]):
        raise SystemExit(f"uda fit ended with {code}")
    return json.loads((place / "summary.json").read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only_data", action="store_true", help="write both.npz and target.npz, and stop")
    parser.add_argument("--freeze_statistics", action="store_true", help="BatchNorm keeps those of the source")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(args.seed)
    (a, y_a), (b, y_b) = clips(800, draw, False), clips(800, draw, True)
    np.savez(folder / "both.npz", studio_x=a, studio_y=y_a, field_x=b, field_y=y_b)
    np.savez(folder / "target.npz", field_x=b, field_y=y_b)
    if args.only_data:
        return
    seed, path = f"--seed_everything={args.seed}", "--data.reader.init_args.path"
    before = run(folder, "spectrograms_source_only", seed, f"{path}={folder / 'both.npz'}")
    (folder / "both.npz").unlink()
    start = folder / "spectrograms_source_only" / "checkpoints" / "last.ckpt"
    kept = f"--model.plugins.refine.init_args.freeze_statistics={str(args.freeze_statistics).lower()}"
    words = [seed, f"{path}={folder / 'target.npz'}", f"--model.init_from={start}", kept]
    after = run(folder, "spectrograms_notela", *words)
    for name, summary in (("source model", before), ("NOTELA", after)):
        values = [100 * summary[m]["last"] for m in ("class_mean_ap", "mean_ap")]
        print(f"{name:13} class-mean average precision {values[0]:.1f}, over clips {values[1]:.1f}")


if __name__ == "__main__":
    main()
