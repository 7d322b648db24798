"""Texts as rows of hashed words, and the universal setting on them."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
import torch

import uda
from uda.data.texts import Texts, hashed_words

WORDS = ["garden", "engine", "violin", "soup", "harbour"]


def write(path, entries):
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write("\n".join(json.dumps(e) for e in entries) + "\n")


def tiny(folder, classes=5, each=12):
    """Headlines and letters on ``classes`` subjects; the first line of a letter is like no headline."""
    draw = np.random.default_rng(0)
    for domain, filler in (("headlines", ["new", "big"]), ("letters", ["dear", "friend", "yours", "truly"])):
        entries = [
            {"text": " ".join(draw.permutation([WORDS[c], f"{WORDS[c]}s", *filler])), "label": WORDS[c]}
            for c in range(classes) for _ in range(each)
        ]  # fmt: skip
        write(folder / f"{domain}.jsonl.gz", entries)
    return Texts(str(folder / "{domain}.jsonl.gz"), width=256)


def test_hashed_words_by_hand():
    together, apart = hashed_words(["Good good, BAD a", "good good bad"], width=2**16)
    assert together == pytest.approx(apart)  # case, points and single letters do not count
    assert sorted(np.abs(together[together != 0])) == pytest.approx([1 / math.sqrt(7)] * 3 + [2 / math.sqrt(7)])
    single = hashed_words(["good", "bad"], width=2**16, bigrams=False)
    columns = [int(np.flatnonzero(row)[0]) for row in single]
    assert [abs(float(together[c])) * math.sqrt(7) for c in columns] == pytest.approx([2.0, 1.0])
    assert len({*columns, *np.flatnonzero(together).tolist()}) == 4  # two words and two pairs
    assert hashed_words([""], width=4).tolist() == [[0.0] * 4]


def test_domains_and_labels(tmp_path):
    reader = tiny(tmp_path)
    assert reader.domains() == ["headlines", "letters"]
    data = reader.read("letters")
    assert data.class_names == sorted(WORDS)
    assert len(data.inputs) == 60
    write(tmp_path / "plain.jsonl.gz", [{"text": "nothing known"}])
    assert reader.read("plain").labels is None


def test_bad_files(tmp_path):
    reader = tiny(tmp_path)
    for domain, entries, message in (
        ("half", [{"text": "a", "label": 1}, {"text": "b"}], "1 of 2"), ("other", [{"body": "a"}], "line 1"),
    ):  # fmt: skip
        write(tmp_path / f"{domain}.jsonl.gz", entries)
        with pytest.raises(uda.UDAError, match=message):
            reader.read(domain)
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(uda.UDAError, match="no texts"):
        reader.read("empty")
    with pytest.raises(uda.UDAError, match="unknown domain"):
        reader.read("letter")
    with pytest.raises(uda.UDAError, match="domain"):
        Texts("one.jsonl")


def test_the_universal_setting_on_texts(tmp_path):
    """Splits by label, and the measures of the setting."""
    import lightning as L

    data = uda.DataModule(
        tiny(tmp_path), "headlines", "letters", setting="universal", batch_size=16, epoch_steps=10, seed=0,
        classes={"known": WORDS[:3], "source_private": [WORDS[3]], "target_private": [WORDS[4]]},
    )  # fmt: skip
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(max_epochs=6, accelerator="cpu", devices=1, **dict.fromkeys(off, False))
    model = uda.UDA(
        "identity", {"reject": uda.Reject()}, bottleneck=16,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9),
    )  # fmt: skip
    trainer.fit(model, data)
    figures = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert figures["oracle/os_star"] > 0.5  # chance is a third at most
    assert {"oracle/h_score", "oracle/unk", "oracle/auroc"} <= figures.keys()
