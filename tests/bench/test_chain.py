"""Methods that start from the checkpoints of other methods' runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from uda.bench import chain
from uda.bench.ledger import Ledger
from uda.bench.listing import listing
from uda.bench.runner import run_all
from uda.errors import UDAError

MCC = {"refine": {"class_path": "MCC"}}
METHODS = {
    "shot": {"plugins": MCC, "init_from": "plain", "source": None},
    "plain": {},
    "other": {"overrides": {"model.bottleneck": 4}},
}


@pytest.fixture
def suite(load):
    return load(methods=METHODS, overrides={"trainer.enable_checkpointing": False})


def done(suite, fake, **options):
    fake.done.clear()
    return run_all(suite.runs(options.pop("only", None)), Ledger(suite.ledger), launch=fake, **options)


def test_the_first_run_comes_first_and_its_checkpoint_is_handed_on(suite, fake):
    assert list(suite.methods) == ["shot", "plain", "other"]  # the order of tables
    assert [r.label for r in suite.runs("a->b/*/0")] == ["a->b/plain/0", "a->b/shot/0", "a->b/other/0"]
    assert len(done(suite, fake).finished) == 12
    config = fake.configs["b->a/shot/1"]
    assert Path(config["model"]["init_from"]).read_text() == "b->a/plain/1"
    assert config["data"]["source"] is None
    assert config["data"]["target"] == "a"
    assert config["trainer"]["enable_checkpointing"] is False
    assert fake.configs["b->a/plain/1"]["trainer"]["enable_checkpointing"] is True
    line = next(r for r in Ledger(suite.ledger).read() if r["method"] == "shot")
    first = next(r for r in Ledger(suite.ledger).read() if r["method"] == "plain")
    assert line["config"]["model"]["init_from"] == f"plain/{first['key']}/last.ckpt"
    assert done(suite, fake).finished == []


def test_another_first_run_makes_another_run(load):
    def keys(plain, **shot):
        suite = load(methods={**METHODS, "plain": plain, "shot": {**METHODS["shot"], **shot}})
        return {r.label: r.key for r in suite.runs()}

    before, after = keys({}), keys({"overrides": {"model.bottleneck": 8}})
    assert {label for label in before if before[label] != after[label]} == {
        label for label in before if "/other/" not in label
    }
    assert before["a->b/shot/0"] != keys({}, checkpoint="selected")["a->b/shot/0"]
    assert before["a->b/other/0"] == load(methods=METHODS).run("a->b", "other", 0).key


def test_what_was_made_before_is_used_and_a_lost_checkpoint_is_made_again(suite, fake):
    assert len(done(suite, fake, only="a->b/plain/0").finished) == 1
    assert done(suite, fake, only="a->b/shot/0").finished == ["a->b/shot/0"]  # the first is there
    first = suite.run("b->a", "plain", 0)
    assert done(suite, fake, only="b->a/shot/0").finished == [first.label, "b->a/shot/0"]  # and comes with it
    chain.checkpoint_of(first, "last").unlink()
    assert done(suite, fake).finished.count(first.label) == 0  # nothing that is left to do needs it
    more = suite.run("b->a", "shot", 0)
    Path(suite.ledger).write_text("".join(
        line for line in Path(suite.ledger).read_text().splitlines(keepends=True) if more.key not in line
    ))  # fmt: skip
    assert f"again     {first.key}" in listing(suite.runs(), Ledger(suite.ledger))
    assert done(suite, fake).finished == [first.label, more.label]
    chain.checkpoint_of(first, "last").unlink()
    assert done(suite, fake).finished == []


def test_nothing_starts_from_a_run_that_failed_and_the_rest_goes_on(suite, launcher, capsys):
    launch = launcher(fail=("a->b/plain/0",))
    tally = done(suite, launch)
    assert (tally.failed, tally.skipped, len(tally.finished)) == (["a->b/plain/0"], ["a->b/shot/0"], 10)
    assert "a->b/shot/0: skipped: it starts from a->b/plain/0, which did not finish" in capsys.readouterr().out
    assert all(r["key"] != suite.run("a->b", "shot", 0).key for r in Ledger(suite.ledger).read())
    launch.fail = ()
    assert done(suite, launch).finished == ["a->b/plain/0", "a->b/shot/0"]


def test_a_checkpoint_that_the_first_run_does_not_leave_is_named(load, fake, capsys):
    suite = load(methods={**METHODS, "shot": {**METHODS["shot"], "checkpoint": "selected"}}, seeds=[0])
    assert len(done(suite, fake, only="shot").skipped) == 2
    assert "a->b/plain/0, which left no selected.ckpt in " in capsys.readouterr().out


def test_workers_wait_for_the_first_run(load, fake, monkeypatch):
    monkeypatch.setattr("uda.bench.runner._POLL", 0.02)
    last = {**METHODS, "third": {"init_from": "shot", "plugins": MCC}}
    suite, order = load(methods=last, seeds=[0, 1, 2]), []

    def launch(run, clean, environment):
        assert not run.starts or Path(run.expanded()[0]["model"]["init_from"]).is_file()
        time.sleep(0.02 if run.starts else 0.1)
        outcome = fake(run, clean, environment)
        order.append(run.label)
        return outcome

    tally = run_all(suite.runs(), Ledger(suite.ledger), workers=3, launch=launch)
    assert (len(tally.finished), tally.skipped, tally.failed) == (24, [], [])
    assert all(order.index(f"{x}/plain/0") < order.index(f"{x}/shot/0") < order.index(f"{x}/third/0")
               for x in ("a->b", "b->a"))  # fmt: skip


def test_a_setting_may_take_the_checkpoints_of_several_and_a_method_one_source_of_a_task(load, fake):
    several = {
        "one": {"source": 0}, "two": {"source": 1},
        "joint": {"plugins": MCC, "source": None, "init_from": {"model.plugins.refine.checkpoints": ["one", "two"]}},
    }  # fmt: skip
    suite = load(methods=several, tasks={"ab->c": {"data.source": ["a", "b"], "data.target": "c"}}, seeds=[0])
    assert len(done(suite, fake).finished) == 3
    assert [fake.configs[f"ab->c/{m}/0"]["data"]["source"] for m in several] == ["a", "b", None]
    files = fake.configs["ab->c/joint/0"]["model"]["plugins"]["refine"]["init_args"]["checkpoints"]
    assert [Path(f).read_text() for f in files] == ["ab->c/one/0", "ab->c/two/0"]
    with pytest.raises(UDAError, match=r"a->b/two: source 1 of the task is asked for, and it has 1"):
        load(methods=several).runs()


def test_jobs_of_a_cluster_come_in_waves(suite, launcher, monkeypatch, capsys):
    pytest.importorskip("submitit")
    from uda.bench import slurm

    launch = launcher(fail=("b->a/plain/0",))
    monkeypatch.setattr(slurm, "fresh", launch)
    runs, ledger = suite.runs("/0"), Ledger(suite.ledger)
    slurm.submit_all(runs, ledger, {}, cluster="debug", wait=False)
    assert "2 runs start from these" in capsys.readouterr().out
    tally = slurm.submit_all(runs, ledger, {}, cluster="debug")
    assert len(launch.done) == len(set(launch.done))
    assert tally.skipped == ["b->a/shot/0"]


def test_a_first_run_that_is_made_again_is_waited_for(suite, fake):
    assert len(done(suite, fake, only="a->b/plain/0").finished) == 1
    run, finished = suite.run("a->b", "shot", 0), Ledger(suite.ledger).finished()
    first = suite.run("a->b", "plain", 0)
    assert chain.waits_for(run, finished) is None
    assert chain.waits_for(run, finished, {first.key}) == (first, "last")  # its checkpoint is about to be deleted
