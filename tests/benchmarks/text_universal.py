"""The universal setting on texts: headlines of reviews as source, their bodies as target, three seeds.

    python tests/benchmarks/text_universal.py --data ../shared/data --folder data/reviews

Reads amazon_{books,dvd,kitchen}.jsonl.gz (``{"text": "headline\\n\\tbody", "label": 0 or 1}`` a line). A class is a
product with a sentiment; a review is in one domain only, so that no body belongs to a headline that was trained on.
Known: books and DVDs, but for the liked DVDs, which only the source has; the target alone has kitchenware.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from pathlib import Path

from uda.cli import main as command

ROOT = Path(__file__).resolve().parents[2]
CLASSES = (
    "{known: [books_disliked, books_liked, dvd_disliked], source_private: [dvd_liked], "
    "target_private: [kitchen_disliked, kitchen_liked]}"
)
METHODS = {
    "source_only": ["reject"], "dann": ["dann", "reject"], "mcc": ["mcc", "reject"], "osbp": ["osbp"],
    "ovanet": ["ovanet"], "dance": ["dance"],
}  # fmt: skip
NAMES = ("h_score", "os_star", "unk", "auroc")


def prepare(data: Path, folder: Path) -> None:
    """Write headlines.jsonl.gz and bodies.jsonl.gz: every other review is of the source."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "headlines.jsonl.gz", "wt") as heads, gzip.open(folder / "bodies.jsonl.gz", "wt") as bodies:
        for product in ("books", "dvd", "kitchen"):
            with gzip.open(data / f"amazon_{product}.jsonl.gz", "rt") as file:
                for number, line in enumerate(file):
                    entry = json.loads(line)
                    head, _, body = entry["text"].strip().partition("\n")
                    source, text = (number // 2 % 2 == 0), (head if number // 2 % 2 == 0 else body).strip()
                    if text:
                        label = f"{product}_{'liked' if entry['label'] else 'disliked'}"
                        print(json.dumps({"text": text, "label": label}), file=heads if source else bodies)


def run(method: str, seed: int, folder: Path) -> dict[str, float]:
    """Train once; the measures of the last epoch on the target."""
    out = folder / "runs" / f"{method}-{seed}"
    overlays = [f"--config={ROOT / 'configs' / 'methods' / (o + '.yaml')}" for o in METHODS[method]]
    words = [
        "fit", f"--config={ROOT / 'configs' / 'reviews_source_only.yaml'}", *overlays,
        f"--data.reader.init_args.path={folder}/{{domain}}.jsonl.gz", "--data.setting=universal",
        f"--data.classes={CLASSES}", "--data.any_method=true", f"--seed_everything={seed}",
        f"--run_dir={out}", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    if code := command(words):
        raise SystemExit(f"uda fit ended with {code}: {' '.join(words)}")
    summary = json.loads((out / "summary.json").read_text())
    return {n: 100 * summary[n]["last"] for n in NAMES}


def main() -> None:
    """Prepare the files, and print a row a method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the amazon_*.jsonl.gz")
    parser.add_argument("--folder", type=Path, required=True, help="where domains and runs are written")
    parser.add_argument("--prepare", action="store_true", help="write the domains only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    prepare(args.data, args.folder)
    if args.prepare:
        return
    print("| method | " + " | ".join(NAMES) + " |\n|---|" + "---|" * len(NAMES))
    for method in args.methods:
        found = [run(method, seed, args.folder) for seed in range(args.seeds)]
        cells = [
            f"{statistics.mean(f[n] for f in found):.1f} ± {statistics.pstdev(f[n] for f in found):.1f}" for n in NAMES
        ]
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
