"""LFTL: its equations in loops, labels from the oracle alone, and the round trip by file."""

from __future__ import annotations

import csv
from typing import ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from uda_sourcefree import LFTL
from uda_sourcefree.lftl import contrastive_scores, persistence
from uda_sourcefree.oracle import LabelsWanted, Oracle, People, SimulatedOracle, class_ids, make_oracle

import uda
from uda.testing import TinyTask, check_plugin

QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip


class Known(Oracle):
    """Answers by a rule, and takes note of what it was asked."""

    seen: ClassVar[list[str]] = []

    def answer(self, ids, turn, class_names):
        Known.seen += ids
        return {i: class_names[int(i.split("/")[1]) % 3] for i in ids}


def write_labels(path, names="abc"):
    with path.open("w", newline="") as out:
        csv.writer(out).writerows([("id", "label"), *((f"target/{i}", names[i % 3]) for i in range(48))])
    return str(path)


@pytest.fixture
def labels(tmp_path):
    return write_labels(tmp_path / "labels.csv")


def fit(plugin, permute=0, epochs=2, rows=48):
    torch.manual_seed(0)
    data = uda.DataModule(
        TinyTask(permute=permute, rows=rows), target="target", batch_size=8, epoch_steps=2, seed=1
    )
    model = uda.UDA("identity", {"refine": plugin}, bottleneck=8, scores=[])
    L.Trainer(max_epochs=epochs, limit_val_batches=0, **QUIET).fit(model, data)
    return model


# ------------------------------------------------------------------------------------------------ equations


@pytest.mark.parametrize("first", [True, False])
def test_scores_by_loops(first):
    draw = np.random.default_rng(0)
    p, old = draw.dirichlet(np.ones(4) * 0.5, 15), draw.dirichlet(np.ones(4), 15)
    q = p if first else p + 0.2 * (p - old)
    margin = [sorted(row)[-1] - sorted(row)[-2] for row in q]
    label = [int(np.argmax(row)) for row in p]
    sure = sorted(range(15), key=lambda i: -margin[i])[:6]
    count = [sum(label[i] == c for i in sure) for c in range(4)]
    expected = [margin[i] / max(margin) + 0.3 * count[label[i]] / max(count) for i in range(15)]
    found = contrastive_scores(torch.tensor(p), None if first else torch.tensor(old), 0.2, 6, 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_persistence_by_loops_and_its_descent():
    draw = np.random.default_rng(1)
    z, m = draw.normal(size=(5, 3)), draw.normal(size=(4, 3))
    total = 0.0
    for v in z:
        a = np.exp([v @ u / np.linalg.norm(v) / np.linalg.norm(u) for u in m])
        a /= a.sum()
        total -= (a * np.log(a)).sum() / 5
    x = torch.tensor(z, requires_grad=True)
    value = persistence(x, torch.tensor(m))
    assert value.item() == pytest.approx(total, rel=1e-6)
    (grad,) = torch.autograd.grad(value, x)
    assert persistence(x - 0.5 * grad, torch.tensor(m)).item() < total


# ------------------------------------------------------------------------------------------------ labels


def test_the_oracle_alone_gives_labels_and_only_of_what_was_asked():
    """Other target labels in the data change nothing; each query is new, and the budget is kept."""
    Known.seen.clear()
    one = fit(LFTL(6, Known(), rounds=2, confident=5))
    assert len(Known.seen) == len(set(Known.seen)) == 6
    plugin = one.plugins["refine"]
    assert sorted(f"target/{i}" for i in plugin.chosen.tolist()) == sorted(Known.seen)
    assert plugin.labels.tolist() == [i % 3 for i in plugin.chosen.tolist()]
    other = fit(LFTL(6, Known(), rounds=2, confident=5), permute=1)
    for k, v in one.state_dict().items():
        torch.testing.assert_close(v, other.state_dict()[k], rtol=0, atol=0)


def test_labels_matter_and_so_does_the_sampling(labels, tmp_path):
    one = fit(LFTL(0.125, SimulatedOracle(labels), rounds=1))
    turned = fit(LFTL(0.125, SimulatedOracle(write_labels(tmp_path / "turned.csv", "bca")), rounds=1))
    drawn = fit(LFTL(0.125, SimulatedOracle(labels), rounds=1, sampling="random"))
    a, b, c = (m.plugins["refine"] for m in (one, turned, drawn))
    assert len(a.chosen) == 6
    assert torch.equal(a.chosen, b.chosen)
    assert torch.equal((a.labels + 1) % 3, b.labels)
    assert not torch.equal(one.head.linear.weight, turned.head.linear.weight)
    assert set(a.chosen.tolist()) != set(c.chosen.tolist())


def test_round_trip_by_file(tmp_path):
    """Each round stops the run once; with all labels filled in it ends, with the queries of the stopped runs."""
    file = tmp_path / "queries.csv"
    for turn in range(2):
        with pytest.raises(LabelsWanted, match=rf"3 samples wait for labels in .*round {turn}"):
            fit(LFTL(6, People(str(file)), rounds=2))
        rows = list(csv.DictReader(file.open()))
        assert len(rows) == 3 * (turn + 1)
        assert all(r["label"] == "" for r in rows if r["round"] == str(turn))
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, ["id", "round", "label"])
            writer.writeheader()
            writer.writerows({**r, "label": str(int(r["id"].split("/")[1]) % 3)} for r in rows)  # numbers do as well
    plugin = fit(LFTL(6, People(str(file)), rounds=2)).plugins["refine"]
    assert [f"target/{i}" for i in plugin.chosen.tolist()] == [r["id"] for r in rows]
    assert plugin.labels.tolist() == [i % 3 for i in plugin.chosen.tolist()]
    with pytest.raises(uda.UDAError, match="another budget or other rounds"):
        fit(LFTL(8, People(str(file)), rounds=2))


def test_bad_input(labels, tmp_path):
    for message, make in {
        "oracle is missing": lambda: LFTL(5),
        "is no oracle": lambda: LFTL(5, {"class_path": "Peeple"}),
        "unexpected keyword": lambda: make_oracle({"class_path": "People", "init_args": {"fle": "x"}}),
        "budget is a share": lambda: LFTL(1.5, Known()),
        "sampling 'best'": lambda: LFTL(5, Known(), sampling="best"),
        "momentum": lambda: LFTL(5, Known(), momentum=0.0),
        "49 labels, but the target has 48": lambda: fit(LFTL(49, Known(), rounds=1)),
        "2 labels does not do for 3 rounds": lambda: fit(LFTL(2, Known(), rounds=3)),
        "as many epochs": lambda: fit(LFTL(6, Known(), rounds=3)),
        "no file": lambda: fit(LFTL(6, SimulatedOracle(str(tmp_path / "none.csv")), rounds=1)),
        "is no class": lambda: class_ids({"1": "d"}, ["1"], ["a", "b"], "People"),
    }.items():
        with pytest.raises(uda.UDAError, match=message):
            make()
    (tmp_path / "x.csv").write_text("id,name\n1,a\n")
    with pytest.raises(uda.UDAError, match="no column 'label'"):
        SimulatedOracle(str(tmp_path / "x.csv")).answer(["1"], 0, ["a"])
    with pytest.raises(uda.UDAError, match="lacks labels: 1"):
        SimulatedOracle(labels).answer(["target/0", "target/99"], 0, ["a"])


@pytest.mark.slow
def test_plugin(labels):
    oracle = {"class_path": "SimulatedOracle", "init_args": {"labels": labels}}
    check_plugin(LFTL, init_args={"budget": 6, "rounds": 2, "oracle": oracle}, ddp=False)
