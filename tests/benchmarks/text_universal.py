"""Domains of the text benchmark: headlines of reviews as source, their bodies as target.

    python tests/benchmarks/text_universal.py --data ../shared/data --folder data/reviews
    uda bench run configs/bench/text_universal.yaml

Reads amazon_{books,dvd,kitchen}.jsonl.gz (``{"text": "headline\\n\\tbody", "label": 0 or 1}`` a line). A class is a
product with a sentiment; a review is in one domain only, so that no body belongs to a headline that was trained on.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path


def prepare(data: Path, folder: Path) -> None:
    """Write headlines.jsonl.gz and bodies.jsonl.gz: two reviews of four are of the source."""
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


def main() -> None:
    """Prepare the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the amazon_*.jsonl.gz")
    parser.add_argument("--folder", type=Path, required=True, help="where the domains are written")
    args = parser.parse_args()
    prepare(args.data, args.folder)


if __name__ == "__main__":
    main()
