"""Scores in a run: one pass, logged names, guard, options, sampling, and two processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import uda
from uda.data import DataModule
from uda.defaults import SCORE as DEFAULT_SCORE
from uda.run.summary import RunSummary
from uda.selection import DEFAULT_SCORES, SCORES, needed_scores, running_choice
from uda.selection.pool import RowSample, draw_order
from uda.selection.shared import SharedScores
from uda.testing import forks
from uda.testing.task import TinyTask

HERE = Path(__file__).resolve()
LOOSE = {"min_used": 0.0, "max_share": 1.0, "min_rank": 0.0}
TIGHT = {"min_rank": 100.0}


class DeepHead(uda.Plugin):
    """A classifier of two layers: it has no class vectors."""

    @uda.hookimpl
    def build(self, model):
        model.head = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, model.num_classes))


def make(**options):
    return uda.UDA(backbone="identity", bottleneck=8, **options)


def figures(trainer, prefix="select/"):
    return {k.removeprefix(prefix): float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}


def test_all_scores_of_one_pass(small_data, quiet_trainer):
    trainer, model = quiet_trainer(), make(scores=list(SCORES), score_options={**LOOSE, "cap": 100})
    trainer.fit(model, small_data())
    found = figures(trainer)
    assert set(found) == {*SCORES, "collapsed"}
    assert all(math.isfinite(v) for v in found.values())
    assert found["collapsed"] == 0
    assert figures(trainer, "guarded/") == {n: found[n] for n in SCORES}


def test_scores_of_a_run_equal_those_of_its_predictions(small_data, quiet_trainer):
    trainer, data = quiet_trainer(), small_data()
    model = make(scores=["im", "snd", "rankme", "dev"], score_options={"cap": 0})
    trainer.fit(model, data)
    found = figures(trainer)
    model.eval()
    pools = {}
    for name, loader in zip(data.eval_domains(), data.val_dataloader(), strict=True):
        rows = [(model.batch(b["x"]), b["y"]) for b in loader]
        columns = zip(*((r.features, r.logits, y) for r, y in rows), strict=True)
        pools[name] = [torch.cat(c).detach() for c in columns]
    (f, z, _), (sf, sz, sy) = pools["target"], pools["source"]
    vectors = model.head.weight_vectors.detach()
    pool = uda.selection.ScorePool(f, z, sf, sz, sy, vectors)
    assert found["im"] == pytest.approx(float(uda.selection.information_maximisation(z)), rel=1e-5)
    for name in ("snd", "rankme", "dev"):
        assert found[name] == pytest.approx(float(SCORES[name].score(pool)), rel=1e-4)


def test_target_labels_change_no_score(quiet_trainer):
    def scores(permute):
        task = TinyTask(permute=permute)
        data = DataModule(task, source="source", target="target", batch_size=16, epoch_steps=40, seed=0)
        trainer = quiet_trainer(max_epochs=1)
        L.seed_everything(0, verbose=False)
        trainer.fit(make(scores=list(SCORES), score_options=LOOSE), data)
        return figures(trainer), figures(trainer, "oracle/")

    (plain, accuracy), (permuted, other_accuracy) = scores(0), scores(5)
    assert plain == permuted
    assert accuracy != other_accuracy


def test_two_sources_share_the_cap(quiet_trainer, monkeypatch):
    seen = []
    monkeypatch.setattr(SharedScores, "_of_pool", lambda self, pool: seen.append(pool) or {})
    data = DataModule(
        TinyTask(sources=2), source=["source", "source2"], target="target", batch_size=8, epoch_steps=2,
        source_val_fraction=0.5, seed=0,
    )  # fmt: skip
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(make(scores=["dev"], score_options={"cap": 21}), data)
    pool = seen[-1]
    assert pool.target_features.shape == (21, 8)
    assert pool.source_features.shape == (22, 8)  # 11 of each
    assert pool.source_logits.shape == (22, 3)
    assert pool.source_y.min() >= 0
    assert pool.class_vectors.shape == (3, 8)


def test_a_score_that_fails_says_so(small_data, quiet_trainer):
    model = make(scores=["dev"], score_options={"cap": 3})
    with pytest.raises(uda.UDAError, match=r"model.scores failed.*at least 4 source validation rows, got 3"):
        quiet_trainer(max_epochs=1).fit(model, small_data())


def test_only_cheap_scores_by_default(small_data, quiet_trainer):
    trainer, model = quiet_trainer(max_epochs=1), make()
    trainer.fit(model, small_data())
    assert set(figures(trainer)) == {*DEFAULT_SCORES, "collapsed"}
    slow = {n for n in DEFAULT_SCORES if SCORES[n].reads == "mixed" or SCORES[n].needs_source}
    assert not slow
    assert [n for n in DEFAULT_SCORES if SCORES[n].reads == "pool"] == [DEFAULT_SCORE]


def test_a_checkpoint_does_not_take_a_collapsed_epoch(small_data, quiet_trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="guarded/im", mode="max", save_on_train_epoch_end=False)
    trainer = quiet_trainer(max_epochs=4, callbacks=[keep], enable_checkpointing=True)
    model = make(score_options=LOOSE)
    check = type(model.score_options.guard).check
    seen = []

    class Third(type(model.score_options.guard)):
        def check(self, sums):  # only the third epoch is sound
            seen.append(float(sums.n))
            return check(self, sums)._replace(collapsed=len(seen) != 3)

    object.__setattr__(model.score_options, "guard", Third(**LOOSE))
    trainer.fit(model, small_data())
    assert len(seen) == 4
    assert "epoch=2" in keep.best_model_path
    assert figures(trainer)["collapsed"] == 1
    assert figures(trainer, "guarded/")["im"] == -math.inf
    assert math.isfinite(figures(trainer)["im"])


def test_a_vote_keeps_the_checkpoint_that_the_summary_names(small_data, quiet_trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="guarded/vote", mode="max", save_on_train_epoch_end=False)
    summary = RunSummary(tmp_path, select_by="vote", show=False)
    trainer = quiet_trainer(max_epochs=5, callbacks=[keep, summary], enable_checkpointing=True)
    model = make(scores=needed_scores("vote"), score_options=LOOSE)
    trainer.fit(model, small_data())
    epoch = summary.summary["selection"]["epoch"]
    assert f"epoch={epoch}-" in keep.best_model_path
    assert epoch == summary.history[running_choice(summary.history, "vote")]["epoch"]


def test_thresholds_come_from_the_model(small_data, quiet_trainer):
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(make(score_options=TIGHT), small_data())
    assert figures(trainer)["collapsed"] == 1


def test_options_are_checked(small_data, quiet_trainer):
    with pytest.raises(uda.UDAError, match=r"unknown score 'sdn'.*'snd'"):
        make(scores=["im", "sdn"])
    with pytest.raises(uda.UDAError, match=r"unknown option 'capp'.*'cap'"):
        make(score_options={"capp": 3})
    with pytest.raises(uda.UDAError, match="0 or more"):
        make(score_options={"cap": -1})
    with pytest.raises(uda.UDAError, match="'dev' needs source data"):
        make(scores=["dev"]).score_options.check([])


def test_a_classifier_without_class_vectors_is_scored_without_their_evenness(small_data, quiet_trainer):
    model, trainer = make(scores=["transfer_score", "im"], plugins={"deep": DeepHead()}), quiet_trainer(max_epochs=1)
    trainer.fit(model, small_data())
    found = figures(trainer)
    tendency = found["transfer_score"] - found["im"] / math.log(model.num_classes)  # the Hopkins statistic
    assert 0.4 < tendency < 1


def test_options_travel_with_the_checkpoint(small_data, quiet_trainer, tmp_path):
    trainer, model = quiet_trainer(max_epochs=1), make(scores=["im", "snd"], score_options={"cap": 50})
    trainer.fit(model, small_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = uda.UDA.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.score_options == model.score_options
    assert again.score_options.names == ("im", "snd")


def test_a_sample_is_the_same_for_any_batches():
    index = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    expected = draw_order(torch.arange(1000), 4).argsort()[:60].sort().values
    for size in (7, 64, 1000):
        sample = RowSample(60, seed=4)
        for part in index.split(size):
            sample.add(part, part.float() * 2)
            assert sum(len(r[0]) for r in sample.rows) <= 2 * 60 + size
        found, doubled = sample.gather(torch.device("cpu"), ())
        assert torch.equal(found, expected)
        assert torch.equal(doubled, expected.float() * 2)
    other = RowSample(60, seed=5)
    other.add(index, index)
    assert not torch.equal(other.gather(torch.device("cpu"), ())[0], expected)
    everything = RowSample(0)
    everything.add(index, index)
    assert torch.equal(everything.gather(torch.device("cpu"), ())[0], torch.arange(1000))


def test_a_draw_is_even():
    numbers = draw_order(torch.arange(20000), 0)
    assert len(set(numbers.tolist())) == 20000
    chosen = numbers.argsort()[:2000].double()
    assert float(chosen.mean()) == pytest.approx(9999.5, abs=4 * 20000 / math.sqrt(12 * 2000))


@pytest.mark.slow
def test_density_of_many_samples_needs_little_memory():
    code = (
        "import resource, torch; from uda.selection import soft_neighbourhood_density as f\n"
        "torch.set_num_threads(1)\n"
        "z = torch.randn(20000, 12); a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "f(z); print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a) / 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5  # GiB; all distances at once are 1.5


def run_rank(out: str) -> None:
    """One process of the test below."""
    from uda.data import Generated

    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    model = make(scores=list(SCORES), score_options={**LOOSE, "cap": 90})
    options = {"batch_size": 16, "epoch_steps": 2, "seed": 0, "eval_batch_size": 33}
    data = DataModule(Generated(), source="source", target="target", **options)
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.validate(model, data, verbose=False)
    Path(f"{out}{ranks}_{trainer.global_rank}.json").write_text(json.dumps(figures(trainer)))


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tmp_path):
    out = str(tmp_path / "scores")
    for world in (1, 2):
        wrong, outputs = forks.run_ranks(run_rank, out, folder=tmp_path, world=world)
        assert not wrong, outputs
    one, first, second = (json.loads(Path(f"{out}{n}.json").read_text()) for n in ("1_0", "2_0", "2_1"))
    assert first == second
    assert set(one) == {*SCORES, "collapsed"}
    for name, value in one.items():
        if name != "mixval":  # pairs are made within a process's batch
            assert first[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
