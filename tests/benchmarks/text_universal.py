"""Domains of the text benchmark: headlines of reviews and bodies of others; and embeddings of short and long reviews.

    python tests/benchmarks/text_universal.py --data ../shared/data --folder data/reviews
    uda bench run configs/bench/text_universal.yaml

Reads amazon_{books,dvd,kitchen}.jsonl.gz (``{"text": "headline\\n\\tbody", "label": 0 or 1}`` a line). A class is a
product with a sentiment; a review is in one domain only, so that no body belongs to a headline that was trained on.
Where amazon_minilm.npz (``<product>_x``, rows of the same reviews by a MiniLM encoder) is in the folder as well, the
rows of reviews up to the median length of their product, and of longer ones, are written as embeddings.npz.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np

PRODUCTS = ("books", "dvd", "kitchen")


def prepare(data: Path, folder: Path) -> None:
    """Write headlines.jsonl.gz and bodies.jsonl.gz: two reviews of four are of the source."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "headlines.jsonl.gz", "wt") as heads, gzip.open(folder / "bodies.jsonl.gz", "wt") as bodies:
        for product in PRODUCTS:
            with gzip.open(data / f"amazon_{product}.jsonl.gz", "rt") as file:
                for number, line in enumerate(file):
                    entry = json.loads(line)
                    head, _, body = entry["text"].strip().partition("\n")
                    source, text = (number // 2 % 2 == 0), (head if number // 2 % 2 == 0 else body).strip()
                    if text:
                        label = f"{product}_{'liked' if entry['label'] else 'disliked'}"
                        print(json.dumps({"text": text, "label": label}), file=heads if source else bodies)


def prepare_embeddings(data: Path, folder: Path) -> None:
    """Write embeddings.npz: embedded reviews, short and long."""
    given = np.load(data / "amazon_minilm.npz")
    found: dict[str, list[np.ndarray]] = {f"{domain}_{key}": [] for domain in ("short", "long") for key in "xy"}
    for number, product in enumerate(PRODUCTS):
        with gzip.open(data / f"amazon_{product}.jsonl.gz", "rt") as file:
            entries = [json.loads(line) for line in file]
        words = np.array([len(e["text"].split()) for e in entries])
        liked = np.array([int(e["label"]) for e in entries])
        if not np.array_equal(liked, given[f"{product}_y"]):
            raise SystemExit(f"amazon_minilm.npz has other labels than amazon_{product}.jsonl.gz: not the same reviews")
        short = words <= np.median(words)
        for domain, rows in (("short", short), ("long", ~short)):
            found[f"{domain}_x"].append(given[f"{product}_x"][rows])
            found[f"{domain}_y"].append(2 * number + liked[rows])
    names = np.array([f"{product}_{word}" for product in PRODUCTS for word in ("disliked", "liked")])
    np.savez(folder / "embeddings.npz", classes=names, **{k: np.concatenate(v) for k, v in found.items()})


def main() -> None:
    """Prepare the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the amazon_*.jsonl.gz")
    parser.add_argument("--folder", type=Path, required=True, help="where the domains are written")
    args = parser.parse_args()
    prepare(args.data, args.folder)
    if (args.data / "amazon_minilm.npz").exists():
        prepare_embeddings(args.data, args.folder)


if __name__ == "__main__":
    main()
