"""LFTL: its equations in loops, labels from the oracle alone, and the round trip by file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from uda_sourcefree import LFTL
from uda_sourcefree.lftl import persistence
from uda_sourcefree.oracle import LabelsWanted, Oracle, People, SimulatedOracle, class_ids, make_oracle
from uda_sourcefree.queries import badge, clue, contrastive_scores, entropies, k_centre

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


def test_entropies_by_loops():
    p = np.random.default_rng(2).dirichlet(np.ones(4), 5)
    p[0] = [1, 0, 0, 0]
    expected = [-sum(v * np.log(v) for v in row if v > 0) for row in p]
    np.testing.assert_allclose(entropies(torch.tensor(p)), expected, atol=1e-12)


def test_k_centre_by_loops():
    draw = np.random.default_rng(3)
    f, known = draw.normal(size=(14, 3)), draw.normal(size=(2, 3))
    for before in (known, known[:0]):
        chosen, places = [], list(before)
        for _ in range(4):
            if places:
                gaps = [min(np.linalg.norm(v - u) for u in places) for v in f]
                row = max((i for i in range(14) if i not in chosen), key=lambda i: gaps[i])
            else:
                row = int(np.argmin([np.linalg.norm(v - f.mean(0)) for v in f]))
            chosen.append(row)
            places.append(f[row])
        assert k_centre(torch.tensor(f).float(), torch.tensor(before).float(), 4).tolist() == chosen


def test_badge_draws_as_explicit_gradients_do():
    """The same rows as k-means++ on the full ``[N, C F]`` gradients, from the same random numbers."""
    torch.manual_seed(0)
    p, f = torch.randn(12, 3, dtype=torch.float64).softmax(1), torch.randn(12, 4, dtype=torch.float64)
    f[5] = f[4]
    p[5] = p[4]  # a copy: once one is taken the other has no chance
    g = torch.stack([torch.outer(q - torch.eye(3)[q.argmax()], v).flatten() for q, v in zip(p, f, strict=True)])
    draw = torch.Generator().manual_seed(1)
    chosen = [int(g.norm(dim=1).argmax())]
    while len(chosen) < 8:
        gap = torch.cdist(g, g[chosen]).amin(1).square()
        gap[gap < 1e-12] = 0
        chosen.append(int(torch.multinomial(gap, 1, generator=draw)))
    found = badge(p, f, 8, torch.Generator().manual_seed(1)).tolist()
    assert found == chosen
    assert not {4, 5} <= set(found)
    assert sorted(badge(p[:5] * 0 + torch.eye(3)[0], f[:5], 5).tolist()) == list(range(5))  # sure of all: anyone


def test_clue_asks_in_each_cluster_near_the_unsure():
    """Three far clusters, three queries: one in each, and there the samples that are not sure draw the centre."""
    place = torch.tensor([[0.0, 0], [50, 0], [0, 50]]).repeat_interleave(4, 0)
    f = place + torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0]]).repeat(3, 1)
    p = torch.tensor([[0.98, 0.02], [0.98, 0.02], [0.98, 0.02], [0.5, 0.5]]).repeat(3, 1)
    weight = [float(-(q * q.log()).sum()) for q in p[:4]]
    centre = sum(w * x for w, x in zip(weight, range(4), strict=True)) / sum(weight)
    best = min(range(4), key=lambda i: abs(i - centre))
    assert best != 1  # else the weights would not matter: the plain mean is 1.5
    assert sorted(clue(p, f, 3).tolist()) == [best, best + 4, best + 8]


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


@pytest.mark.parametrize("sampling", ["margin", "entropy", "badge", "clue", "k_centre"])
def test_each_way_of_sampling_buys_the_budget(labels, sampling):
    plugin = fit(LFTL(6, SimulatedOracle(labels), rounds=2, sampling=sampling)).plugins["refine"]
    assert len(set(plugin.chosen.tolist())) == 6
    assert plugin.labels.tolist() == [i % 3 for i in plugin.chosen.tolist()]


def test_queried_samples_have_no_part_among_the_unlabelled(labels):
    """With the whole target labelled nothing is left to the unlabelled terms, whatever their weights."""
    one = fit(LFTL(48, SimulatedOracle(labels), rounds=1))
    other = fit(LFTL(48, SimulatedOracle(labels), rounds=1, entropy_weight=0.0, persistence_weight=0.0))
    some = fit(LFTL(24, SimulatedOracle(labels), rounds=1))
    less = fit(LFTL(24, SimulatedOracle(labels), rounds=1, entropy_weight=0.0, persistence_weight=0.0))
    torch.testing.assert_close(one.head.linear.weight, other.head.linear.weight, rtol=0, atol=0)
    assert not torch.equal(some.head.linear.weight, less.head.linear.weight)


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


HEAD, ONE = "id,round,label\r\n", "t/1,0,a\r\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\ufeff" + HEAD + ONE, {"t/1": "a"}),  # as a spreadsheet saves it
        (HEAD + "t/1,0.0, a \r\n,,\r\n\r\n", {"t/1": "a"}),
        (HEAD + ONE + "t/1,0,\r\n", {"t/1": "a"}),  # a line twice
        (HEAD + "t/1,0,b\r\n" + ONE, "'t/1' two labels, 'b' and 'a'"),
        (HEAD + "t/1,,a\r\n", "round '' for 't/1'"),
        (HEAD.replace(",", ";") + ONE, "separated by commas"),
        ((HEAD + ONE).encode() + b"\xe9", "CSV in UTF-8"),
    ],
)
def test_a_file_as_people_leave_it(tmp_path, text, found):
    file = tmp_path / "queries.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(found, dict):
        assert People(str(file)).answer(list(found), 0, "ab") == found
    else:
        with pytest.raises(uda.UDAError, match=found):
            People(str(file)).asked(0)


def test_later_rounds_begin_a_line_of_their_own(tmp_path):
    """Whatever the last line of an edited file ends with."""
    (tmp_path / "q.csv").write_text((HEAD + ONE).strip())
    oracle = People(str(tmp_path / "q.csv"))
    with pytest.raises(LabelsWanted, match="1 samples"):
        oracle.answer(["t/2"], 1, "ab")
    assert oracle.asked(0) == ["t/1"]
    assert oracle.asked(1) == ["t/2"]
    assert class_ids({"t/1": "1.0"}, ["t/1"], ["a", "b"], "People") == [1]


def test_bad_input(labels, tmp_path):
    for message, make in {
        "oracle is missing": lambda: LFTL(5),
        "is no oracle": lambda: LFTL(5, {"class_path": "Peeple"}),
        "unexpected keyword": lambda: make_oracle({"class_path": "People", "init_args": {"fle": "x"}}),
        "budget is a share": lambda: LFTL(1.5, Known()),
        "budget is a share in": lambda: LFTL(float("inf"), Known()),
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
def test_the_overlay_asks_a_person(tmp_path, monkeypatch, capsys):
    from uda.cli import main

    configs = Path(__file__).resolve().parents[3] / "configs"
    monkeypatch.chdir(tmp_path)
    code = main([
        "fit", "--config", str(configs / "digits_source_only.yaml"), "--data.source=null", "--config",
        str(configs / "methods" / "active" / "lftl.yaml"), "--model.plugins.refine.init_args.budget=6",
        "--trainer.max_epochs=2", "--data.epoch_steps=2", "--trainer.logger=false",
    ])  # fmt: skip
    assert code == 2
    assert "3 samples wait for labels in queries.csv (round 0)" in capsys.readouterr().err
    assert [row["label"] for row in csv.DictReader(Path("queries.csv").read_text().splitlines())] == [""] * 3


@pytest.mark.slow
def test_plugin(labels):
    oracle = {"class_path": "SimulatedOracle", "init_args": {"labels": labels}}
    check_plugin(LFTL, init_args={"budget": 6, "rounds": 2, "oracle": oracle}, ddp=False)
